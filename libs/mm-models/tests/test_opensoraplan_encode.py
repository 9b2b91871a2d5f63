"""What an Open-Sora-Plan model is told, and by which encoders."""

from dataclasses import replace

import pytest
import torch

from mm_models.diffusion.objective import Pixels
from mm_models.families import find
from mm_models.opensoraplan.encode import Conditioning, objective, text_encoder
from mm_models.opensoraplan.testing import write_encoders

FAMILY, PRESET = find("opensoraplan-tiny")


def test_prompts_as_mt5_encodes_them_with_padding(tmp_path):
    """Alone and unpadded, a prompt is encoded as among 512 rows of which the rest is masked, as the makers do it."""
    from transformers import AutoTokenizer, MT5EncoderModel

    write_encoders(tmp_path)
    encoder = text_encoder(PRESET.config, tmp_path, "cpu", torch.float32)
    prompts = ["a cat sleeps", "two dogs run along a river"]
    encoded = encoder.encode(prompts)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    given = tokenizer(prompts, padding="max_length", max_length=512, return_tensors="pt")
    model = MT5EncoderModel.from_pretrained(tmp_path / "text_encoder")
    with torch.no_grad():
        expected = model(input_ids=given.input_ids, attention_mask=given.attention_mask).last_hidden_state
    for one, row, seen in zip(encoded, expected, given.attention_mask, strict=True):
        assert one.shape == (seen.sum(), 64)
        assert (one - row[: len(one)]).norm() / one.norm() < 1e-5


def test_prompts_take_the_form_of_the_captions(tmp_path):
    write_encoders(tmp_path)
    encoder = text_encoder(PRESET.config, tmp_path, "cpu", torch.float32)
    one, other = encoder.encode(["(A  Cat) SLEEPS", "a cat sleeps"])
    assert torch.equal(one, other)
    assert not torch.equal(one[: len(one) - 1], encoder.encode(["a cat runs"])[0][: len(one) - 1])


def test_encoders_fit_and_the_vae_is_there(tmp_path):
    write_encoders(tmp_path)
    assert FAMILY.video.fit(PRESET.config, tmp_path) == PRESET.config
    assert FAMILY.video.multiples(PRESET.config, tmp_path) == (4, 16, 16)
    codec = FAMILY.video.codec(tmp_path, "cpu", torch.float32, "none")
    assert (codec.channels, codec.stride) == (4, (4, 8, 8))


def test_inputs_are_padded_and_masked():
    told = Conditioning(PRESET.config, "t2v")
    latents, t, text = torch.zeros(2, 4, 1, 4, 4), torch.tensor([1.0, 2.0]), torch.ones(2, 5, 64)
    given = told.inputs(latents, t, text, {})
    assert given.keys() == {"video", "t", "text", "text_mask"}
    assert given["text"].shape == (2, 512, 64)
    assert given["text_mask"].sum(1).tolist() == [5, 5]
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    seen = torch.ones(2, 1, 4, 4).bool()
    given = told.inputs(latents, t, text, {}, text_mask=mask, video_mask=seen)
    assert given["text_mask"].sum(1).tolist() == [5, 2]
    assert given["video_mask"] is seen


@pytest.mark.parametrize("name", ["opensoraplan-tiny", "wan-tiny"])
def test_no_prompt_is_cut_in_silence(name):
    """…as padding by a negative number would: features of 6 rows for a model of 5."""
    family, preset = find(name)
    told = family.video.conditioning(replace(preset.config, text_tokens=5), "t2v")
    latents, t = torch.zeros(1, preset.config.out_channels, 1, 4, 4), torch.ones(1)
    with pytest.raises(ValueError, match=r"encoded to 6 rows, but .* read 5: ask for text_tokens 6"):
        told.inputs(latents, t, torch.ones(1, 6, 64), {}, text_mask=torch.ones(1, 6).bool())
    assert told.inputs(latents, t, torch.ones(1, 5, 64), {})["text"].all()


def test_there_are_no_conditions():
    told = Conditioning(PRESET.config, "t2v")
    assert told.encode(Pixels((5, 16, 16)), None) == [{}]
    assert not told.find_misfit(())
    assert told.find_misfit(["control"]) == "holds control, and t2v takes no condition"
    assert told.stored == {}
    assert told.always == {"latents": 4, "text": 64}


def test_the_objective_is_what_the_makers_train_with():
    goal = objective(PRESET.config, "t2v", **FAMILY.objective_options)
    assert goal.describe() == "DDPM, levels 0 to 999, epsilon, min-SNR 5, noise offset 0.02"
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        type(PRESET.config)(prediction_type="sample")

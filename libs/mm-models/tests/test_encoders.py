"""UMT5, mT5 and the Wan VAE, from a diffusers directory that the test writes: tiny, random, in the real format."""

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_models.encoders import TextEncoder, clean, loading
from mm_models.opensoraplan.captions import clean as clean_captions
from mm_models.wan.vae import WanVAE

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "moves", "left", "&", "▁"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    path = tmp_path_factory.mktemp("repository")
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, is_encoder_decoder=False)
    text = UMT5EncoderModel(config)
    for parameter in text.parameters():
        parameter.data.normal_(0, 0.3)
    text.save_pretrained(path / "text_encoder")

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    tokenizer.save_pretrained(path / "tokenizer")

    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.save_pretrained(path / "vae")
    return path


@pytest.fixture
def copy(repository, tmp_path):
    return shutil.copytree(repository, tmp_path / "copy")


def test_prompts(repository):
    encoder = TextEncoder(repository, dtype=torch.float32)
    prompts = ["a red circle moves left", "a", ""]
    encoded = encoder.encode(prompts)
    assert [tuple(e.shape) for e in encoded] == [(6, 32), (2, 32), (1, 32)]
    for prompt, e in zip(prompts, encoded, strict=True):
        assert torch.equal(encoder.encode([prompt])[0], e)
    assert not torch.allclose(*(encoder.encode([p])[0] for p in ("a red circle", "a circle red")))


def test_prompts_as_diffusers_encodes_them(repository):
    """WanPipeline pads, masks, and cuts again."""
    from diffusers import WanPipeline

    encoder = TextEncoder(repository, dtype=torch.float32)
    pipeline = WanPipeline(encoder.tokenizer, encoder.model, None, None)
    prompts = ["a red  circle &amp; moves", "a"]
    expected, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=24)
    for ours, theirs in zip(encoder.encode(prompts), expected, strict=True):
        assert torch.allclose(ours, theirs[: len(ours)], atol=1e-5)
        assert not theirs[len(ours) :].any()


def test_cleaning():
    assert clean("  a &amp;amp; b\n\tcafÃ© ") == "a & b café"


def test_long_prompts_are_cut_with_a_warning(repository):
    encoder = TextEncoder(repository, dtype=torch.float32, max_length=4)
    with pytest.warns(UserWarning, match="6 tokens was cut to 4"):
        (encoded,) = encoder.encode(["a red circle moves left"])
    assert torch.equal(encoded, encoder.encode(["a red circle"])[0])


def test_videos(repository):
    vae = WanVAE(repository)
    assert vae.stride == (4, 8, 8)
    video = torch.rand(2, 3, 9, 16, 24) * 2 - 1
    latents = vae.encode(video)
    assert latents.shape == (2, 16, 3, 2, 3)
    assert latents.dtype == torch.float32
    posterior = vae.vae.encode(video).latent_dist
    mean, std = (torch.tensor(vae.vae.config[key]).view(1, 16, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    assert torch.allclose(latents, (posterior.mean - mean) / std, atol=1e-6)
    assert torch.allclose(vae.encode(video[:1]), latents[:1], atol=1e-5)

    decoded = vae.decode(latents)
    assert decoded.shape == video.shape
    assert torch.allclose(decoded, vae.vae.decode(posterior.mean).sample, atol=1e-5)
    assert decoded.abs().max() <= 1


def test_video_sizes_that_would_be_cropped(repository):
    vae = WanVAE(repository)
    with pytest.raises(ValueError, match=r"8 frames: must be 4k \+ 1, e\.g\. 5"):
        vae.encode(torch.zeros(1, 3, 8, 16, 16))
    with pytest.raises(ValueError, match=r"20x16 pixels: both must be multiples of 8, e\.g\. 16x16"):
        vae.encode(torch.zeros(1, 3, 5, 20, 16))
    with pytest.raises(ValueError, match="must be B 3 F H W"):
        vae.encode(torch.zeros(3, 5, 16, 16))


@pytest.mark.parametrize(("part", "load"), [("text_encoder", TextEncoder), ("tokenizer", TextEncoder), ("vae", WanVAE)])
def test_missing_folders(copy, part, load):
    shutil.rmtree(copy / part)
    with pytest.raises(ValueError, match=f"{part} is not a folder"):
        load(copy)


@pytest.mark.parametrize(
    ("file", "load"),
    [("text_encoder/model.safetensors", TextEncoder), ("vae/diffusion_pytorch_model.safetensors", WanVAE)],
)
def test_missing_files_and_tensors(copy, file, load):
    tensors = load_file(copy / file)
    name = next(name for name in tensors if name.endswith("weight") and "norm" not in name)

    save_file({other: tensor for other, tensor in tensors.items() if other != name}, copy / file, {"format": "pt"})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load(copy)
    save_file(tensors | {"spare.weight": torch.zeros(1)}, copy / file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"spare\.weight"):
        load(copy)
    save_file(tensors | {name: torch.zeros(3, 3)}, copy / file, {"format": "pt"})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load(copy)
    (copy / file).unlink()
    with pytest.raises(ValueError, match=r"has neither .*safetensors"):
        load(copy)


def test_identity(repository, copy):
    text, video = TextEncoder(repository).identity, WanVAE(repository).identity
    assert len({text, video}) == 2
    assert (TextEncoder(copy).identity, WanVAE(copy).identity) == (text, video), "a copy is the same encoder"
    assert TextEncoder(copy, dtype=torch.float32).identity != text
    assert TextEncoder(copy, max_length=24).identity != text
    cut = WanVAE(copy, tiling="training")
    assert cut.identity == WanVAE(copy, tiling="inference").identity != video, "diffusers has one kind of tiles"
    assert cut.vae.use_tiling

    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"][0] += 1  # trained further: same names, same sizes
    save_file(tensors, file, {"format": "pt"})
    assert WanVAE(copy).identity != video


def test_no_bar_in_a_log_and_the_setting_is_given_back(repository, capfd):
    from transformers.utils import logging

    TextEncoder(repository, dtype=torch.float32)
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()


@pytest.fixture(scope="module")
def mt5(tmp_path_factory):
    """mT5 as google/mt5-xxl publishes its tokenizer: spiece.model, and no tokenizer.json."""
    import sentencepiece
    from transformers import MT5Config, MT5EncoderModel

    path = tmp_path_factory.mktemp("mt5")
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
    model = MT5EncoderModel(MT5Config(vocab_size=96, feed_forward_proj="gated-gelu", **shape))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(path / "text_encoder")

    words = io.BytesIO()
    sentences = ["a red circle moves to the left", "the blue square rests", "then it stops, and a café opens"] * 20
    marks = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=words,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **marks,
    )
    folder = path / "tokenizer"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(words.getvalue())
    tokens = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens), encoding="utf-8")
    said = tokens | {"extra_ids": 0, "additional_special_tokens": None, "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    return path


def test_mt5_as_upstream_encodes_prompts(mt5):
    """Padded to 64 tokens and masked, in one batch; ours go through one by one."""
    import sentencepiece
    from transformers import MT5EncoderModel

    encoder = TextEncoder(mt5, dtype=torch.float32, max_length=64, kind="mt5")
    prompts = ["a red circle moves, then it stops", "the blue square", ""]
    ours = encoder.encode(prompts)

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(mt5 / "tokenizer" / "spiece.model"))
    rows = [[*pieces.encode(prompt), 1] for prompt in prompts]
    assert [len(one) for one in ours] == [len(row) for row in rows] != [1, 1, 1]
    ids = torch.tensor([row + [0] * (64 - len(row)) for row in rows])
    model = MT5EncoderModel.from_pretrained(mt5 / "text_encoder").eval()
    with torch.no_grad():
        theirs = model(ids, attention_mask=(ids != 0).long()).last_hidden_state
    for one, row in zip(ours, theirs, strict=True):
        assert torch.allclose(one, row[: len(one)], atol=1e-5)


def test_the_kind_of_a_text_encoder_is_that_of_its_folder(mt5, repository):
    with pytest.raises(ValueError, match="model_type is 'mt5', and must be 'umt5'"):
        TextEncoder(mt5)
    with pytest.raises(ValueError, match="model_type is 'umt5', and must be 'mt5'"):
        TextEncoder(repository, kind="mt5")


def test_sentencepiece_is_asked_for(mt5, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "sentencepiece" else object())
    with pytest.raises(ValueError, match=r"spiece\.model is read by sentencepiece, not .*mm-models\[encoders\]"):
        TextEncoder(mt5, kind="mt5")


def test_a_cleaner_is_part_of_the_identity(mt5):
    usual, own = TextEncoder(mt5, kind="mt5"), TextEncoder(mt5, kind="mt5", cleaner=clean_captions)
    assert usual.identity != own.identity
    assert torch.equal(own.encode(["A <b>RED</b> circle"])[0], own.encode(["a red circle"])[0])
    assert not torch.equal(own.encode(["A RED circle"])[0], usual.encode(["A RED circle"])[0])


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("", ""),
        ("A Cat, in the <b>Rain</b>! &amp; more", "a cat, in the rain! more"),
        ("(masterpiece), (best quality), a CAT. emotional, 4k", "masterpiece , best quality , a cat. emotional, 4k"),
        ("see https://www.example.com/page or me@mail.com", "see or me"),
        ("this-is-my-cute-cat by @nick", "this is my cute cat by"),
        ("\u201cquoted\u201d \u2014 dash \u2018one\u2019 more", "\"quoted\" - dash 'one' more"),
        ("#123 1234567 jc6640 a.png in 1920x1080", "in"),
        ("一只猫 ㈱ walks ..  slowly\n", "一只猫 walks slowly"),
        ("x : y , z/a,b.c", "x: y , z a, b. c"),
        ("a%20b+c", "a b c"),
        ("a <script>var b = 1;</script>cat<style>i {c: d}</style> runs", "a cat runs"),
        (
            "<![CDATA[a cat]]> &lt;i&gt; runs &bogus; &#39;so&#39; at&t &copy; r&b &quote",
            "a cat runs bogus 'so' at t r b e",
        ),
        ("a <![ cat <![person", "a <! cat <! person"),  # which no parser of HTML understands
    ],
)
def test_prompts_are_cleaned_as_the_captions_of_open_sora_plan(prompt, cleaned):
    assert clean_captions(prompt) == cleaned

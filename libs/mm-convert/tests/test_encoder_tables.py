"""UMT5, mT5 and Wan's VAEs against the classes of transformers and diffusers; what is published is in test_presets."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mm_convert import convert, open_checkpoint
from mm_convert.cli import main
from mm_convert.families import MT5, UMT5, WAN_2_2_VAE, WAN_VAE
from mm_convert.read.content import identify

TEXT = dict(vocab_size=72, dim=24, ffn_dim=40, num_heads=3, head_dim=8, buckets=6)
VAE = dict(base_dim=8, z_dim=16, in_channels=3, out_channels=3)
VAE_2_2 = dict(base_dim=8, decoder_base_dim=12, z_dim=48, in_channels=12, out_channels=12)

# family, sizes, layers
TOYS = {
    "umt5": (UMT5, TEXT, {"i": 2}),
    "mt5": (MT5, TEXT, {"i": 3}),
    "wan-vae": (WAN_VAE, VAE, {}),
    "wan2.2-vae": (WAN_2_2_VAE, VAE_2_2, {}),
}


def model_of(name, config_json):
    torch = pytest.importorskip("torch")
    if name.endswith("mt5"):
        transformers = pytest.importorskip("transformers")
        (kind,) = config_json["architectures"]
        shape = getattr(transformers, kind).config_class(**config_json)
        build = lambda: getattr(transformers, kind)(shape)  # noqa: E731
    else:
        diffusers = pytest.importorskip("diffusers")
        build = lambda: diffusers.AutoencoderKLWan.from_config(config_json)  # noqa: E731
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("name", TOYS)
def test_names_and_shapes_are_those_of_the_class(name):
    family, sizes, layers = TOYS[name]
    ours = family.table.shapes(family.table.dialects[0], sizes, layers)
    content = identify(ours, name)
    assert content.config == sizes | ({"num_layers": layers["i"]} if layers else {})
    config, notes = family.complete(content.config)
    assert not notes
    state = model_of(name, family.write_config[content.dialect](config)).state_dict()
    theirs = {key: tuple(tensor.shape) for key, tensor in state.items()}
    content = identify(theirs, name)  # with the second name of an embedding, which is dropped
    assert {content.names[key]: shape for key, shape in theirs.items() if key not in content.ignored} == ours


@pytest.mark.parametrize("name", [name for name in TOYS if name != "mt5"])  # which has one set of names
def test_original_files_load_into_the_class_and_come_back(name, toys, tmp_path):
    family, sizes, layers = TOYS[name]
    ours = family.table.dialects[0]
    original = toys.write_checkpoint(tmp_path / "original", family.table.shapes("original", sizes, layers))
    convert(original, tmp_path / "theirs", to=ours)
    convert(tmp_path / "theirs", tmp_path / "back", to="original")
    file = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (original / file).read_bytes()
    assert not (tmp_path / "back" / "config.json").exists()  # none is published

    torch = pytest.importorskip("torch")
    library = pytest.importorskip("transformers" if name == "umt5" else "diffusers")
    safetensors = pytest.importorskip("safetensors.torch")
    kind = library.UMT5EncoderModel if name == "umt5" else library.AutoencoderKLWan
    model, report = kind.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values()), report
    names = identify({key: tensor.shape for key, tensor in model.state_dict().items()}, name).translate("original")
    saved = safetensors.load_file(original / file)
    for key, tensor in model.state_dict().items():
        if key in names:
            assert torch.equal(tensor.view(torch.int32), saved[names[key]].view(torch.int32)), key


def test_statistics_of_latents_that_nobody_published():
    content = identify(WAN_VAE.table.shapes("original", VAE | {"z_dim": 5}, {}), "toy")
    config, notes = WAN_VAE.complete(content.config)
    assert not {"latents_mean", "latents_std"} & set(config)
    assert len(notes) == 2
    known = WAN_VAE.read_config({"latents_mean": [0.5] * 5, "latents_std": [1.5] * 4})
    config, notes = WAN_VAE.complete(known | content.config)
    assert config["latents_mean"] == [0.5] * 5
    assert "latents_std is said to be [1.5, 1.5, 1.5, 1.5], which is not 5 numbers" in notes[0]


def test_a_config_json_of_another_text_encoder_is_refused():
    with pytest.raises(ValueError, match="model_type is 'mt5'"):
        UMT5.read_config({"model_type": "mt5"})


SAVE = """
import sys, torch
from transformers import MT5Config, MT5ForConditionalGeneration
torch.manual_seed(0)
shape = dict(vocab_size=72, d_model=24, d_kv=8, d_ff=40, num_heads=3, num_layers=3, num_decoder_layers=2)
config = MT5Config(**shape, relative_attention_num_buckets=6, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
model = MT5ForConditionalGeneration(config)
for parameter in model.parameters():
    parameter.data.normal_()
config.architectures = ["MT5ForConditionalGeneration"]
config.save_pretrained(sys.argv[1])
torch.save(model.state_dict(), sys.argv[1] + "/pytorch_model.bin")
"""


@pytest.fixture(scope="module")
def published_mt5(tmp_path_factory):
    """As google/mt5-xxl: a pickle of encoder, decoder and head, with embeddings that share their storage."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("mt5-xxl")
    subprocess.run([sys.executable, "-c", SAVE, str(folder)], check=True)
    (folder / "spiece.model").write_bytes(b"the tokenizer's")
    return folder


def test_the_encoder_of_a_published_mt5(published_mt5, tmp_path, capfd):
    import torch
    from transformers import MT5Config, MT5EncoderModel, MT5ForConditionalGeneration

    main(["convert", str(published_mt5), str(tmp_path / "text_encoder"), "--to", "transformers"])
    note = " ".join(capfd.readouterr().err.split())
    assert "tensors are left out (of the decoder: a prompt needs the encoder alone)" in note
    assert (tmp_path / "text_encoder" / "model.safetensors").exists()
    encoder, report = MT5EncoderModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not any(report.values()), report
    whole = MT5ForConditionalGeneration(MT5Config.from_pretrained(published_mt5))
    whole.load_state_dict(torch.load(published_mt5 / "pytorch_model.bin", weights_only=True))
    ids = torch.tensor([[5, 9, 3, 1]])
    with torch.no_grad():
        ours, theirs = (model.eval()(ids).last_hidden_state for model in (encoder, whole.get_encoder()))
    assert torch.equal(ours, theirs)


def test_text_encoders_are_told_apart_by_their_biases(toys, tmp_path):
    """Also where they are whole, with decoders: both have one shape and nearly all names."""
    for family, layers in ((MT5, 2), (UMT5, 2)):
        shapes = family.table.shapes("transformers", TEXT, {"i": layers})
        bias = {"SelfAttention.relative_attention_bias": (6, 3), "SelfAttention.q": (24, 24)}
        blocks = range(layers if family is UMT5 else 1)
        decoder = {
            f"decoder.block.{i}.layer.0.{name}.weight": shape
            for name, shape in bias.items()
            for i in (blocks if "bias" in name else range(layers))
        }
        for kind, more in (("encoder", {}), ("whole", decoder | {"lm_head.weight": (72, 24)})):
            path = tmp_path / f"{family.name}-{kind}.safetensors"
            toys.write_safetensors(path, shapes | more)
            checkpoint = open_checkpoint(path)
            assert (checkpoint.family, len(checkpoint)) == (family.name, len(shapes))


def test_mt5_is_converted_without_torch(published_mt5, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None; from mm_convert.cli import main; "
        f"main(['convert', {str(published_mt5)!r}, {str(tmp_path / 'encoder')!r}, '--to', 'transformers'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    said = json.loads((tmp_path / "encoder" / "config.json").read_text(encoding="utf-8"))
    assert (said["model_type"], said["architectures"], said["num_layers"]) == ("mt5", ["MT5EncoderModel"], 3)


def test_parts_in_torchs_format_have_a_way_out(tmp_path):
    for name in ("-00001-of-00002.bin", "-00002-of-00002.bin", ".bin.index.json"):
        (tmp_path / f"pytorch_model{name}").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin\.index\.json names parts .*`save_pretrained`"):
        open_checkpoint(tmp_path)

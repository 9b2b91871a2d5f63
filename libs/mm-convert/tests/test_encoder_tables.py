"""UMT5 and the VAEs of Wan against the classes of transformers and diffusers; what is published is in test_presets."""

from __future__ import annotations

import pytest

from mm_convert import convert
from mm_convert.families import UMT5, WAN_2_2_VAE, WAN_VAE
from mm_convert.read.content import identify

TEXT = dict(vocab_size=72, dim=24, ffn_dim=40, num_heads=3, head_dim=8, buckets=6)
VAE = dict(base_dim=8, z_dim=16, in_channels=3, out_channels=3)
VAE_2_2 = dict(base_dim=8, decoder_base_dim=12, z_dim=48, in_channels=12, out_channels=12)

# family, sizes, layers
TOYS = {
    "umt5": (UMT5, TEXT, {"i": 2}),
    "wan-vae": (WAN_VAE, VAE, {}),
    "wan2.2-vae": (WAN_2_2_VAE, VAE_2_2, {}),
}


def model_of(name, config_json):
    torch = pytest.importorskip("torch")
    if name == "umt5":
        transformers = pytest.importorskip("transformers")
        build = lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**config_json))  # noqa: E731
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
    assert content.config == sizes | ({"num_layers": 2} if name == "umt5" else {})
    config, notes = family.complete(content.config)
    assert not notes
    state = model_of(name, family.write_config[content.dialect](config)).state_dict()
    theirs = {key: tuple(tensor.shape) for key, tensor in state.items()}
    content = identify(theirs, name)  # with the second name of an embedding, which is dropped
    assert {content.names[key]: shape for key, shape in theirs.items() if key not in content.ignored} == ours


@pytest.mark.parametrize("name", TOYS)
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

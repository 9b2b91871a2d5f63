"""CLIP, and the VAE of Wan2.2, from a diffusers directory that the test writes: tiny, random, in the real format."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_models.encoders import ImageEncoder, TextEncoder
from mm_models.wan.testing import write_encoders
from mm_models.wan.vae import WanVAE


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("repository"), image_dim=24, vae="wan2.2")


@pytest.fixture
def copy(repository, tmp_path):
    return shutil.copytree(repository, tmp_path / "copy")


def test_images_as_transformers_sees_them(repository):
    """A file's pixels, cut and normalised as published repositories say, through all blocks but the last."""
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionModel

    encoder = ImageEncoder(repository)
    frames = torch.randint(256, (2, 3, 4, 6), generator=torch.Generator().manual_seed(0)).byte()
    frames = frames.repeat_interleave(16, 2).repeat_interleave(16, 3)  # 64 x 96: cut, and made smaller
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor([Image.fromarray(f.permute(1, 2, 0).numpy()) for f in frames], return_tensors="pt").pixel_values
    model = CLIPVisionModel.from_pretrained(repository / "image_encoder")
    with torch.no_grad():
        hidden = model(pixels, output_hidden_states=True).hidden_states
    assert len(hidden) == 3 + 1

    encoded = encoder.encode(frames / 127.5 - 1, crop=True)
    assert encoded.shape == (2, 257, 24)
    # The processor rounds the scaled image to 256 steps and cuts what overshoots; we do neither.
    assert (encoded - hidden[-2]).norm() / (hidden[-2] - hidden[-2].mean(0)).norm() < 0.08
    assert (encoded - hidden[-1]).norm() > 5 * (encoded - hidden[-2]).norm()
    assert torch.allclose(encoder.encode(frames[:1] / 127.5 - 1, crop=True), encoded[:1], atol=1e-5)
    assert (encoded[0] - encoded[1]).norm() > 0.2 * encoded[0].norm()


def test_an_image_is_squashed_as_wan_was_trained(repository):
    """Every point of the picture in its place, by plain bicubic interpolation."""
    encoder = ImageEncoder(repository)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    squashed = torch.nn.functional.interpolate(image, (32, 32), mode="bicubic", align_corners=False)
    assert torch.allclose(encoder.encode(image), encoder.encode(squashed), atol=1e-5)
    assert not torch.allclose(encoder.encode(image), encoder.encode(image, crop=True), atol=1e-2)


def test_images_of_clips_own_size_exactly(repository):
    encoder = ImageEncoder(repository)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    pixels = torch.stack([(images[:, c] / 2 + 0.5 - mean[c]) / std[c] for c in range(3)], dim=1)
    expected = encoder.model(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(encoder.encode(images), expected, atol=1e-5)
    with pytest.raises(ValueError, match="must be B 3 H W"):
        encoder.encode(images[0])


def test_the_names_in_published_files(repository, copy):
    """With the prefix vision_model., as files have them, or without, as transformers holds them now."""
    file = copy / "image_encoder" / "model.safetensors"
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in load_file(file).items()}
    image = torch.rand(1, 3, 40, 24) * 2 - 1
    expected = ImageEncoder(repository).encode(image)
    for prefix in ("", "vision_model."):
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
        assert torch.equal(ImageEncoder(copy).encode(image), expected), prefix


def test_clip_is_loaded_strictly(copy):
    file = copy / "image_encoder" / "model.safetensors"
    before, tensors = ImageEncoder(copy).identity, load_file(file)
    assert ImageEncoder(copy, dtype=torch.bfloat16).identity != before
    name = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))
    for wrong in (
        {other: tensor for other, tensor in tensors.items() if other != name},
        tensors | {name: torch.zeros(3, 3)},
        tensors | {"layers.1.mlp.fc1.weight.spare": torch.zeros(1)},
    ):
        save_file(wrong, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"1 (missing|mismatched|unexpected) keys, first .*layers\.1\.mlp\.fc1"):
            ImageEncoder(copy)
    shutil.rmtree(copy / "image_encoder")
    with pytest.raises(ValueError, match=r"image_encoder/, as the model's makers publish it"):
        ImageEncoder(copy)


def test_videos_of_wan_2_2(repository, copy):
    """48 channels, 4x16x16. The published config.json has a field, clip_output, that the class does not take."""
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"clip_output": False}))
    vae = WanVAE(copy)
    assert vae.stride == (4, 16, 16)
    assert vae.latent_shape(9, 64, 32) == (48, 3, 4, 2)
    video = torch.rand(2, 3, 9, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(video)
    assert latents.shape == (2, *vae.latent_shape(9, 64, 32))

    from diffusers import AutoencoderKLWan

    other = AutoencoderKLWan.from_pretrained(repository / "vae")
    mean, std = (torch.tensor(other.config[key]).view(1, 48, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        raw = other.encode(video).latent_dist.mode()
        assert torch.allclose(latents, (raw - mean) / std, atol=1e-6)
        assert torch.allclose(vae.decode(latents), other.decode(raw).sample, atol=1e-5)
    assert torch.allclose(vae.encode(video[:, :, :5]), latents[:, :, :2], atol=1e-4), "causal"
    assert torch.allclose(vae.encode(video[:, :, :1]), latents[:, :, :1], atol=1e-4), "ti2v's first frame"
    with pytest.raises(ValueError, match=r"72x32 pixels: both must be multiples of 16, e\.g\. 64x32"):
        vae.encode(torch.zeros(1, 3, 5, 72, 32))


def test_encoders_move_as_a_whole(repository):
    """To a device and back, as training does between batches. There is no other than meta here."""
    for encoder in (TextEncoder(repository), ImageEncoder(repository), WanVAE(repository)):
        assert encoder.to("meta") is encoder
        module = getattr(encoder, "vae", None) or encoder.model
        held = [value for value in vars(encoder).values() if isinstance(value, torch.Tensor)]
        assert {tensor.device.type for tensor in [*module.parameters(), *held]} == {"meta"}
        assert encoder.device.type == "meta"
    assert encoder.encode(torch.zeros(1, 3, 5, 32, 32)).is_meta

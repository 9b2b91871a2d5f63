"""The causal VAE of Open-Sora-Plan: against diffusers' AutoencoderKL, against formulas, and against itself."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from torch import Tensor

from mm_models.opensoraplan.vae_config import OLDER, VAEConfig
from mm_models.opensoraplan.vae_model import (
    Attention,
    CausalConv3d,
    CausalVAE,
    Downsample3d,
    MixedAttention,
    ResnetBlock2d,
    ResnetBlock3d,
    Upsample2d,
    Upsample3d,
)

TINY = VAEConfig(hidden_size=32, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1)
LADDER = VAEConfig(hidden_size=32)  # the widths 1, 2, 4, 4 and two blocks of the released one


def build(config: VAEConfig = TINY, seed: int = 0) -> CausalVAE:
    torch.manual_seed(seed)
    return stir(CausalVAE(config))


def stir(module: torch.nn.Module) -> torch.nn.Module:
    """With norms that do something: as they are made, their weights are ones and their biases zeros."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.GroupNorm):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.uniform_(layer.bias, -0.5, 0.5)
    return module


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rel(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_the_released_one_has_its_tensors():
    with torch.device("meta"):
        tensors = CausalVAE(VAEConfig()).state_dict()
    assert len(tensors) == 248
    assert sum(tensor.numel() for tensor in tensors.values()) == 239_189_991


# --- one frame: an image VAE


class Bilinear(torch.nn.Module):
    """As trilinear upsampling is of one frame."""

    def __init__(self, conv: torch.nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="bilinear"))


WORDS = {"mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1", "norm_out": "conv_norm_out"}
WORDS |= {"mid.attn_1.norm": "mid_block.attentions.0.group_norm", "nin_shortcut": "conv_shortcut"}
WORDS |= {f"mid.attn_1.{part}": f"mid_block.attentions.0.to_{part}" for part in "qkv"}
WORDS |= {"mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0"}
WORDS |= {f"down.{n}.block": f"down_blocks.{n}.resnets" for n in range(4)}
WORDS |= {f"down.{n}.downsample": f"down_blocks.{n}.downsamplers.0" for n in range(4)}
WORDS |= {f"up.{n}.block": f"up_blocks.{3 - n}.resnets" for n in range(4)}
WORDS |= {f"up.{n}.upsample": f"up_blocks.{3 - n}.upsamplers.0" for n in range(4)}


def flat(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Name and value in diffusers' VAE of images: before one frame stand its copies, so kernels over time add up."""
    for word, other in WORDS.items():
        name = name.replace(word, other)
    name = name.replace(".conv.conv.", ".conv.") if "samplers" in name else name.replace(".conv.", ".")
    tensor = tensor.sum(2) if tensor.ndim == 5 else tensor
    return name, tensor[:, :, 0, 0] if ".to_" in name and tensor.ndim == 4 else tensor


@pytest.fixture(scope="module")
def pair() -> tuple[CausalVAE, AutoencoderKL]:
    ours = build(LADDER).double()
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    theirs = AutoencoderKL(block_out_channels=(32, 64, 128, 128), layers_per_block=2, **kinds).double()
    theirs.load_state_dict(dict(flat(name, tensor) for name, tensor in ours.state_dict().items()))
    for block in theirs.decoder.up_blocks[:2]:
        assert isinstance(block.upsamplers[0], Upsample2D)
        block.upsamplers[0] = Bilinear(block.upsamplers[0].conv)
    return ours, theirs


def test_one_frame_is_encoded_as_an_image_is(pair):
    ours, theirs = pair
    image = draw(2, 3, 32, 48).double()
    mean, logvar = ours.encode(image[:, :, None])
    posterior = theirs.encode(image).latent_dist
    assert rel(mean[:, :, 0], posterior.mean) < 1e-10
    assert rel(logvar[:, :, 0], posterior.logvar) < 1e-10
    _compare_gradients(pair, (mean[:, :, 0] * posterior.mean.detach()).sum() + logvar.sum(),
                       (posterior.mean * posterior.mean.detach()).sum() + posterior.logvar.sum())  # fmt: skip


def test_one_frame_is_decoded_as_an_image_is(pair):
    ours, theirs = pair
    latents = draw(2, 4, 4, 6).double()
    image = theirs.decode(latents).sample
    video = ours.decode(latents[:, :, None])
    assert rel(video[:, :, 0], image) < 1e-10
    _compare_gradients(pair, video.square().sum(), image.square().sum())


def _compare_gradients(pair, loss: Tensor, other: Tensor) -> None:
    """Of a kernel over time, each slice has the gradient of the image's kernel."""
    ours, theirs = pair
    names = {flat(name, tensor)[0]: name for name, tensor in ours.named_parameters()}
    one = torch.autograd.grad(loss, list(ours.parameters()), allow_unused=True)
    one = dict(zip(dict(ours.named_parameters()), one, strict=True))
    two = torch.autograd.grad(other, list(theirs.parameters()), allow_unused=True)
    compared = 0
    for name, expected in zip(dict(theirs.named_parameters()), two, strict=True):
        found = one[names[name]]
        assert (found is None) == (expected is None), name
        if found is None:
            continue
        slices = found.unbind(2) if found.ndim == 5 else [found]
        for part in slices:
            part = part.reshape(expected.shape)
            assert (part - expected).norm() <= 1e-9 * expected.norm() + 1e-9, name
        compared += 1
    assert compared > 100


# --- a video that stands still


@pytest.mark.parametrize("frames", [5, 9, 17])
def test_a_video_that_stands_still_has_one_latent_again_and_again(frames):
    vae = build().double()
    image = draw(1, 3, 1, 16, 24).double()
    one, _ = vae.encode(image)
    many, _ = vae.encode(image.expand(-1, -1, frames, -1, -1))
    assert many.shape[2] == (frames - 1) // 4 + 1
    torch.testing.assert_close(many, one.expand_as(many), rtol=1e-9, atol=1e-9)
    video = vae.decode(many)
    assert video.shape == (1, 3, frames, 16, 24)
    torch.testing.assert_close(video, vae.decode(one).expand_as(video), rtol=1e-9, atol=1e-9)


# --- layers, by their formulas


def test_a_convolution_over_time_begins_with_copies_of_the_first_frame():
    layer, x = CausalConv3d(4, 6, 3), draw(2, 4, 5, 6, 8)
    frames = [x[:, :, max(i, 0)] for i in range(-2, 5)]
    weight, bias = layer.conv.weight, layer.conv.bias
    expected = [
        sum(F.conv2d(frames[i + k], weight[:, :, k], padding=1) for k in range(3)) + bias[:, None, None]
        for i in range(5)
    ]
    torch.testing.assert_close(layer(x), torch.stack(expected, 2), rtol=1e-4, atol=1e-5)


def test_downsampling_takes_every_second_frame_and_looks_at_two_before():
    layer, x = Downsample3d(4), draw(2, 4, 5, 6, 8)
    frames = F.pad(torch.stack([x[:, :, max(i, 0)] for i in range(-2, 5)], 2), (0, 1, 0, 1))
    weight, bias = layer.conv.conv.weight, layer.conv.conv.bias
    expected = [
        sum(F.conv2d(frames[:, :, 2 * i + k], weight[:, :, k], stride=2) for k in range(3)) + bias[:, None, None]
        for i in range(3)
    ]
    assert layer(x).shape == (2, 4, 3, 3, 4)
    torch.testing.assert_close(layer(x), torch.stack(expected, 2), rtol=1e-4, atol=1e-5)


def linear(x: Tensor, dim: int) -> Tensor:
    """Twice as long: three quarters of the nearer and a quarter of the other neighbour, the ends repeated."""
    before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
    after = torch.cat([x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, x.shape[dim] - 1, 1)], dim)
    both = torch.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], dim + 1)
    return both.flatten(dim, dim + 1)


def test_upsampling_spares_the_first_frame_and_does_not_look_at_it():
    layer, x = Upsample3d(4), draw(2, 4, 4, 3, 5)
    wide = linear(linear(x, 3), 4)
    frames = torch.cat([wide[:, :, :1], linear(wide[:, :, 1:], 2)], 2)
    torch.testing.assert_close(layer(x), layer.conv(frames), rtol=1e-4, atol=1e-5)
    assert layer(x).shape == (2, 4, 7, 6, 10)
    joined = layer.conv(linear(wide, 2)[:, :, 1:])
    assert rel(joined, layer(x)) > 0.01  # otherwise this test says nothing


def test_the_last_level_repeats_rows_and_columns():
    layer, x = Upsample2d(4), draw(2, 4, 3, 3, 5)
    images = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
    expected = [F.conv2d(images[:, :, i], layer.conv.conv.weight[:, :, 0], layer.conv.conv.bias, padding=1)
                for i in range(3)]  # fmt: skip
    torch.testing.assert_close(layer(x), torch.stack(expected, 2), rtol=1e-4, atol=1e-5)


def norm(x: Tensor, layer: torch.nn.GroupNorm) -> Tensor:
    """Each of 32 groups with its channels, frames, rows and columns, less their mean and by their deviation."""
    groups = x.view(len(x), 32, -1)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, unbiased=False)
    y = ((groups - mean) / (variance + 1e-6).sqrt()).view(x.shape)
    return y * layer.weight.view(-1, 1, 1, 1) + layer.bias.view(-1, 1, 1, 1)


def test_norms_are_over_all_frames_of_a_video_and_over_each_image():
    block, x = stir(ResnetBlock3d(32, 64)), draw(2, 32, 3, 4, 4)
    expected = block.conv2(F.silu(norm(block.conv1(F.silu(norm(x, block.norm1))), block.norm2)))
    torch.testing.assert_close(block(x), expected + block.nin_shortcut(x), rtol=1e-4, atol=1e-5)

    images = x.transpose(1, 2).flatten(0, 1)
    block = stir(ResnetBlock2d(32, 32))
    alone = torch.cat([block(image[None]) for image in images])
    torch.testing.assert_close(block(images), alone, rtol=1e-4, atol=1e-5)


def test_frames_are_attended_to_one_by_one():
    layer, x = stir(Attention(32)), draw(2, 32, 3, 4, 5)
    y = layer.norm(x)
    for i in range(3):
        q, k, v = (part(y)[:, :, i].flatten(2) for part in (layer.q, layer.k, layer.v))  # B C N
        weights = (torch.einsum("bcn,bcm->bnm", q, k) / 32**0.5).softmax(-1)
        frame = torch.einsum("bnm,bcm->bcn", weights, v).unflatten(2, (4, 5))
        expected = x[:, :, i] + layer.proj_out(frame[:, :, None])[:, :, 0]
        torch.testing.assert_close(layer(x)[:, :, i], expected, rtol=1e-4, atol=1e-5)


def test_attention_of_the_older_vaes_takes_frames_for_channels():
    """The same weights give something else with it, but not of one frame: it must be told which they were made with."""
    one, other = stir(Attention(32)), MixedAttention(32)
    other.load_state_dict(one.state_dict())
    x = draw(2, 32, 3, 4, 5)
    assert rel(other(x), one(x)) > 0.01
    torch.testing.assert_close(other(x[:, :, :1]), one(x[:, :, :1]))
    q, k, v = (part(one.norm(x)).reshape(6, 32, 20) for part in (one.q, one.k, one.v))
    weights = (torch.einsum("bcn,bcm->bnm", q, k) / 32**0.5).softmax(-1)
    expected = x + one.proj_out(torch.einsum("bnm,bcm->bcn", weights, v).reshape(x.shape))
    torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)

    new, old = build(), CausalVAE(VAEConfig(**TINY.__dict__ | {"attention": OLDER}))
    old.load_state_dict(new.state_dict())
    video = draw(1, 3, 9, 16, 24)
    assert rel(old.encode(video)[0], new.encode(video)[0]) > 0.01
    assert rel(old.encode(video[:, :, :1])[0], new.encode(video[:, :, :1])[0]) < 1e-5


def test_every_input_and_every_weight_has_a_part_in_the_result():
    vae = build()
    video = draw(1, 3, 5, 16, 16).requires_grad_()
    mean, logvar = vae.encode(video)
    (vae.decode(mean).square().sum() + logvar.square().sum()).backward()
    assert all(parameter.grad.any() for parameter in vae.parameters())
    assert video.grad.flatten(3).any(-1).all()


def test_images_of_the_flat_half_do_not_change_one_another(monkeypatch):
    vae, video = build(), draw(2, 3, 9, 16, 24)
    several = vae.encode(video)[0]
    monkeypatch.setattr("mm_models.opensoraplan.vae_model.FRAMES", 100)
    torch.testing.assert_close(vae.encode(video)[0], several, rtol=1e-5, atol=1e-6)

"""The video VAE of the demo's Open-Sora-Plan: a very small but real `CausalVAEModel` (stride 4, 8, 8; 4 channels).

    python docs/demo/causal_codec.py docs/demo/causal_codec       # trains it (about 11 minutes on one core)
    python docs/demo/causal_codec.py docs/demo/causal_codec --sheet codec.png     # only measures it, and draws

The result is shipped in docs/demo/causal_codec, so the demo does not run this. The training clips are more varied than
the demo's (any colour, size and velocity), so the codec knows shapes in general, not the demo's data set.

Its norms have 32 groups, as always in this class, and here 32 or 64 channels. So each channel loses its own strength
over a video, and with it the colours: trained from random weights, the codec saw where things are, but all of them in
grey. It begins instead as a codec that is written down (`write_colour_path`): mean colours of 4x8x8 pixels, kept apart
from the norms by a pattern at the border of the picture that is stronger than they are. Training makes it sharp.
"""

import argparse
import json
import math
import time
from pathlib import Path

import clips
import codec as wan
import measure
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mm_models.opensoraplan.vae import SCALE, load
from mm_models.opensoraplan.vae_config import VAEConfig, describe
from mm_models.opensoraplan.vae_model import CausalVAE, ResnetBlock3d

CONFIG = VAEConfig(hidden_size=32, hidden_size_mult=(1, 1, 1, 2), num_res_blocks=1)  # 2.2 million parameters
CLIPS = 2  # per step
KL = 1e-4  # its weight
COLOUR = 2.0  # weight of the differences between red, green and blue, beside that of all three
FIRST_LOGVAR = -4.0  # of the noise on the latents when training starts
MARGIN = 16  # pixels from the border, where a shape passes in the middle of its clip

# The channels of the colour path: red, green, blue; their opposites, as what leaves a norm goes through a SiLU and
# silu(x) - silu(-x) = x; and how brightness changes over the frames of a latent, of both signs.
RED, NOT_RED, CHANGE, CARRIED = 0, 3, 6, 8
LAST = -1  # the channel that is made constant, see `draw_border`


def random_clips(rng: np.random.Generator, count: int) -> Tensor:
    """B 3 F H W in [-1, 1]"""
    return wan.to_video(np.stack([wan.random_clip(rng, clips.SIZE, MARGIN) for _ in range(count)]))


# --- the codec that training starts from


def new_codec(seed: int = 0) -> CausalVAE:
    """Blocks that do nothing yet, time that is only copied, and the colour path."""
    torch.manual_seed(seed)
    codec = CausalVAE(CONFIG)
    with torch.no_grad():
        for module in codec.modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3:
                module.weight[:, :, :2] = 0  # the past
                module.weight[:, :, 2] *= 3**0.5
            if isinstance(module, ResnetBlock3d):  # those of images, too
                nn.init.zeros_(_kernel(module.conv2).weight)
        for half in (codec.encoder, codec.decoder):
            nn.init.zeros_(half.mid.attn_1.proj_out.conv.weight)
        write_colour_path(codec)
    return codec


def write_colour_path(codec: CausalVAE) -> None:
    """Latents 0, 1, 2 are the mean colours of 4x8x8 pixels, latent 3 is how brightness changes over the 4 frames."""
    encoder, decoder = codec.encoder, codec.decoder
    places = [list(range(CARRIED))] * 3 + [list(range(0, 2 * CARRIED, 2))]  # on each level; on the last two to a group
    colours = torch.eye(3)
    encoder.conv_in.weight[:CARRIED] = 0
    encoder.conv_in.bias[:CARRIED] = 0
    encoder.conv_in.weight[RED:NOT_RED, :, 1, 1], encoder.conv_in.weight[NOT_RED:CHANGE, :, 1, 1] = colours, -colours
    for level, down in enumerate(encoder.down):
        if (shortcut := down.block[0].nin_shortcut) is not None:
            carry(shortcut, places[level - 1], places[level], torch.ones(1))
        if level == 0:
            mean = torch.zeros(3, 3)
            mean[:2, :2] = 1 / 4
            carry(down.downsample.conv, places[level], places[level], mean)
        elif level < 3:
            mean = torch.zeros(3, 3, 3)
            mean[1:, :2, :2] = 1 / 8
            carry(down.downsample.conv, places[level], places[level], mean)
            change = mean * torch.tensor([0, -1, 1])[:, None, None] * (2 if level == 2 else 1)
            weight = _kernel(down.downsample.conv).weight
            for sign, row in ((1, CHANGE), (-1, CHANGE + 1)):
                weight[places[level][row], places[level][RED:NOT_RED]] = sign * change
    draw_border(encoder.mid.block_2, [place + 1 for place in places[3]], 3.0)
    write_difference(encoder.conv_out, places[3], 2.0, 4)
    write_identity(codec.quant_conv)
    codec.quant_conv.conv.bias[CONFIG.embed_dim :] = FIRST_LOGVAR
    write_identity(codec.post_quant_conv)

    centre = torch.zeros(3, 3, 3)
    centre[2, 1, 1] = 1
    carry(decoder.conv_in, [0, 1, 2], places[3][RED:NOT_RED], centre)
    carry(decoder.conv_in, [0, 1, 2], places[3][NOT_RED:CHANGE], -centre)
    for level in (3, 2, 1, 0):
        up, path = decoder.up[level], places[level][RED:CHANGE]
        if (shortcut := up.block[0].nin_shortcut) is not None:
            carry(shortcut, places[level + 1][RED:CHANGE], path, torch.ones(1))
        if level:
            carry(up.upsample.conv, path, path, centre if level > 1 else centre[2:])
    draw_border(decoder.up[0].block[-1], places[0][RED:CHANGE], 4.0)
    decoder.conv_out.conv.weight.mul_(0.03)
    decoder.conv_out.conv.bias.fill_(-0.8)
    write_difference(decoder.conv_out, places[0], 0.7, 3)


def _kernel(convolution: nn.Module) -> nn.Conv2d | nn.Conv3d:
    """Of a causal convolution the one that it wraps."""
    return getattr(convolution, "conv", convolution)


def carry(convolution: nn.Module, sources: list[int], targets: list[int], taps: Tensor) -> None:
    """Each target channel becomes its source, seen through these taps, and nothing else."""
    kernel = _kernel(convolution)
    kernel.weight[targets], kernel.bias[targets] = 0, 0
    kernel.weight[targets, sources] = taps.expand(kernel.weight.shape[2:])


def write_difference(convolution: nn.Module, places: list[int], gain: float, count: int) -> None:
    """Outputs 0, 1, 2 become red, green and blue minus their opposites, and output 3, if asked for, the change."""
    kernel = _kernel(convolution)
    kernel.weight[:3, places] = 0
    pairs = [(RED + i, NOT_RED + i) for i in range(3)] + [(CHANGE, CHANGE + 1)]
    for row, (plus, minus) in enumerate(pairs[:count]):
        kernel.weight[row], kernel.bias[row] = (0, 0) if count == 4 else (kernel.weight[row], kernel.bias[row])
        kernel.weight[row, places[plus], 2, 1, 1], kernel.weight[row, places[minus], 2, 1, 1] = gain, -gain


def write_identity(convolution: nn.Module) -> None:
    """The first four channels pass."""
    kernel = _kernel(convolution)
    kernel.weight[:4], kernel.bias[:4] = 0, 0
    kernel.weight[range(4), range(4)] = 1


def draw_border(block: ResnetBlock3d, places: list[int], strength: float) -> None:
    """Adds a pattern to these channels which is 0 but for the outermost pixels, and there about `strength`.

    The block's last channel becomes constant; only at the border, where zeros are around it, does a kernel whose taps
    sum to 0 see it.
    """
    block.norm2.weight[LAST], block.norm2.bias[LAST] = 0, 2
    taps = torch.full((3, 3), -strength / 3 / nn.functional.silu(torch.tensor(2.0)))
    taps[1, 1] *= -8
    kernel = _kernel(block.conv2)
    kernel.weight[:, LAST] = 0
    kernel.weight[places, LAST, 2] = taps


# --- training


def train(codec: CausalVAE, steps: int, lr: float, seed: int = 0) -> None:
    """Reconstruct through noisy latents: absolute and squared error, a little KL."""
    rng = np.random.default_rng([seed, 1])
    generator = torch.Generator().manual_seed(seed)
    test = wan.demo_clips()[::6]
    both = wan.optimizers(codec, lr)
    began = time.process_time()
    for step in range(steps):
        video = random_clips(rng, CLIPS)
        noise = torch.randn(CLIPS, 4, 3, 8, 8, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            restored, mean, logvar = codec(video, noise)
        difference = restored.float() - video
        tint = difference - difference.mean(1, keepdim=True)
        error = size_of(difference) + COLOUR * size_of(tint)
        kl = 0.5 * (mean.float().square() + logvar.float().exp() - 1 - logvar.float()).mean()
        (error + KL * kl).backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        for optimizer, share in zip(both, (1, 0.25), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * lr * min((step + 1) / 50, 0.01 + 0.99 * math.cos(math.pi / 2 * step / steps) ** 2)
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0:
            quality, seconds = wan.psnr(test, reconstruct(codec, test)), time.process_time() - began
            print(f"{seconds:5.0f} s, step {step:5d}: error {error:.4f}, kl {kl:.3f}, {quality:.2f} dB", flush=True)


def size_of(difference: Tensor) -> Tensor:
    return difference.abs().mean() + difference.square().mean()


@torch.no_grad()
def reconstruct(codec: CausalVAE, video: Tensor) -> Tensor:
    """Through the mean of the posterior."""
    return torch.cat([codec(some)[0] for some in video.split(8)])


@torch.no_grad()
def normalise(codec: CausalVAE) -> None:
    """Moves mean and deviation of the latents, per channel, into the 1x1x1 convolutions around them.

    Afterwards the latents of clips such as the demo's have mean 0, and times SCALE the deviation 1: no config.json of
    this class can say them. What is decoded stays the same.
    """
    latents = torch.cat([codec.encode(some)[0] for some in wan.demo_clips().split(8)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    gain = 1 / (SCALE * std)
    into, out = codec.quant_conv.conv, codec.post_quant_conv.conv
    count = len(gain)
    out.bias += (out.weight[:, :, 0, 0, 0] * mean).sum(1)
    out.weight /= gain[None, :, None, None, None]
    into.weight[:count] *= gain[:, None, None, None, None]
    into.bias[:count] = (into.bias[:count] - mean) * gain
    into.bias[count:] += 2 * gain.log()  # of the log of the variance


def save(codec: CausalVAE, folder: Path) -> None:
    """In the files of the released one, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(describe(codec.config), indent=1) + "\n", encoding="utf-8")
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in codec.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


def report(folder: Path, path: Path | None) -> None:
    codec = load(folder)
    video = wan.demo_clips()
    began = time.time()
    restored = reconstruct(codec, video)
    seconds = (time.time() - began) / len(video)
    seen = [measure.look(frames) for frames in wan.to_frames(restored)]
    rights = [one.matches(wanted) for one, wanted in zip(seen, clips.all_combinations(), strict=True)]
    shares = ", ".join(f"{name} {100 * np.mean([right[name] for right in rights]):.0f} %" for name in rights[0])
    print(
        f"{wan.psnr(video, restored):.2f} dB over {len(video)} clips, {1000 * seconds:.0f} ms per clip to encode and "
        f"decode; right: {shares}, overlap {np.mean([one.overlap for one in seen]):.2f}"
    )
    if path:
        pairs = [wan.to_frames(v) for i in range(0, len(video), 11) for v in (video[i], restored[i])]
        wan.sheet(pairs, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument(
        "--sheet", type=Path, help="do not train: measure the codec in the folder and draw this picture"
    )
    options = parser.parse_args()
    if not options.sheet:
        codec = new_codec()
        train(codec, options.steps, options.lr)
        normalise(codec)
        save(codec, options.folder)
    report(options.folder, options.sheet)


if __name__ == "__main__":
    main()

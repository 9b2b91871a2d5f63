"""The demo's video VAE: a very small but real diffusers `AutoencoderKLWan` (stride 4, 8, 8; 16 channels).

    python docs/demo/codec.py docs/demo/codec            # trains it (15 minutes on one core) and writes the folder
    python docs/demo/codec.py docs/demo/codec --sheet codec.png     # only measures it, and draws what it does

The result is shipped in docs/demo/codec, so the demo does not run this. The training clips are more varied than the
demo's (any colour, size, place and velocity), so the codec knows shapes in general, not the demo's data set.
(The shipped one comes from two runs: the first two of the STAGES below for 10 minutes, the last two for 4.)
"""

import argparse
import math
import time
from contextlib import contextmanager
from pathlib import Path

import clips
import numpy as np
import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import nn

from mm_models.encoders.loading import load_strictly

STAGES = (  # until this part of the time: clips per batch, width of the window in pixels, frames, weight of the KL
    (0.25, 16, 32, 1, 1e-4),  # how things look: an image codec; trained on clips at once, it would not start to learn
    (0.7, 2, 32, clips.FRAMES, 1e-4),  # how they move; a small window sees as many edges for a quarter of the price
    (0.85, 2, 32, clips.FRAMES, 3e-3),  # noisier, so smoother latents: much easier to generate, and as sharp in the end
    (1.0, 2, clips.SIZE, clips.FRAMES, 3e-3),
)
FIRST_LOGVAR = -4.0  # of the noise on the latents when training starts: at diffusers' 0 it would drown everything
SMALLEST_STD = 0.25  # of the largest: channels that carry nothing are not blown up to unit variance


def random_clip(rng: np.random.Generator, size: int, margin: float = -4) -> np.ndarray:
    """uint8 F size size 3: a shape of any colour and velocity that passes somewhere through the window, in the middle
    of the clip at least `margin` pixels from its border.
    """
    middle, velocity = rng.uniform(margin, size - margin, 2), rng.uniform(-5, 5, 2)
    if rng.random() < 0.5:
        velocity[rng.integers(2)] = 0  # along an axis, as in the demo
    start = middle - velocity * (clips.FRAMES - 1) / 2
    dull, bright = rng.uniform(20, 90), rng.uniform(190, 255)
    colour = rng.permutation([dull, bright, rng.uniform(dull, bright)])
    if rng.random() < 0.5:
        colour = np.array(list(clips.COLOURS.values())[rng.integers(len(clips.COLOURS))]) + rng.uniform(-8, 8, 3)
    shape = clips.SHAPES[rng.integers(3)]
    return clips.render(
        shape, colour, start, velocity, radius=rng.uniform(7, 13), background=rng.uniform(8, 48), size=size
    )


def to_video(frames: np.ndarray) -> torch.Tensor:
    """uint8 … F H W 3 to float … 3 F H W in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, -4).float() / 127.5 - 1


def to_frames(video: torch.Tensor) -> np.ndarray:
    return ((video.movedim(-4, -1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()


def batch(rng: np.random.Generator, count: int, size: int) -> torch.Tensor:
    return to_video(np.stack([random_clip(rng, size) for _ in range(count)]))


def demo_clips(repeats: int = 1) -> torch.Tensor:
    """All 72 combinations as the demo draws them, held-out ones too: B 3 F H W in [-1, 1]."""
    rng = np.random.default_rng(2)
    return to_video(np.stack([clips.draw(c, rng) for c in clips.all_combinations() * repeats]))


def new_codec(seed: int = 0) -> wan.AutoencoderKLWan:
    """Untrained: a shallow image codec that treats four frames as one. Blocks do nothing yet, time is only copied."""
    torch.manual_seed(seed)
    codec = wan.AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    nn.init.constant_(codec.quant_conv.bias[codec.config.z_dim :], FIRST_LOGVAR)
    for module in codec.modules():
        if isinstance(module, wan.WanCausalConv3d) and module.kernel_size[0] == 3:
            module.weight.data[:, :, :2] = 0  # the past
            module.weight.data[:, :, 2] *= 3**0.5
        if isinstance(module, wan.WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, wan.WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
        if isinstance(module, wan.WanResample) and hasattr(module, "time_conv"):
            weight, channels = module.time_conv.weight.data, module.time_conv.in_channels
            copies = weight.shape[0] // channels
            weight[:, :, 2, 0, 0] = torch.eye(channels).repeat(copies, 1)
            weight[:, :, :2] = 0
    return codec


class Muon(torch.optim.Optimizer):
    """Steps of which every direction is equally long, for the kernels of convolutions (Jordan et al., 2024).

    In half the steps of Adam, these leave the plateaus on which an autoencoder knows a patch's mean colour only. Here
    in float32, and for kernels as matrices (rows: output channels), which torch.optim.Muon does not take.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:  # convolutions over time see no single images
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(mean, group["momentum"]).flatten(1)
                x = x / (x.norm() + 1e-7)
                for _ in range(5):  # Newton-Schulz: all singular values towards 1
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                p.add_(x.view_as(p), alpha=-group["lr"] * 0.2 * max(x.shape) ** 0.5)


def optimizers(codec: wan.AutoencoderKLWan, lr: float) -> list[torch.optim.Optimizer]:
    kernels = [p for p in codec.parameters() if p.ndim >= 4 and len(p) > 1 and p[0].numel() > 1]
    chosen = {id(p) for p in kernels}
    others = [p for p in codec.parameters() if id(p) not in chosen]  # biases, norms
    return [Muon(kernels, lr), torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.0)]


@contextmanager
def whole_clips():
    """Lets the codec's networks see a clip at once, for training: twice as fast as diffusers' chunks, the same result.

    diffusers resamples time only between cached chunks of four frames. Of a whole clip, the first frame goes its own
    way and the later ones are halved or doubled.
    """

    def resample(self, x, feat_cache=None, feat_idx=None):  # B C F H W
        later = x.shape[2] > 1
        if self.mode == "upsample3d" and later:
            doubled = torch.stack(self.time_conv(x[:, :, 1:]).chunk(2, dim=1), dim=3).flatten(2, 3)
            x = torch.cat((x[:, :, :1], doubled), dim=2)
        x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        if self.mode == "downsample3d" and later:
            x = torch.cat((x[:, :, :1], self.time_conv(x)), dim=2)
        return x

    def norm(self, x):
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12) * self.gamma

    before = wan.WanResample.forward, wan.WanRMS_norm.forward
    wan.WanResample.forward, wan.WanRMS_norm.forward = resample, norm
    try:
        yield
    finally:
        wan.WanResample.forward, wan.WanRMS_norm.forward = before


@torch.no_grad()
def reconstruct(codec: wan.AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    return torch.cat([codec.decode(codec.encode(v).latent_dist.mode()).sample for v in video.split(8)])


def psnr(video: torch.Tensor, other: torch.Tensor) -> float:
    """Decibels, of values in [-1, 1]."""
    return 10 * math.log10(4 / (video - other).square().mean().item())


def train(codec: wan.AutoencoderKLWan, folder: Path, minutes: float, lr: float = 8e-3, seed: int = 0) -> None:
    """Reconstruct through noisy latents (absolute and squared error, a little KL), for so many minutes of CPU time.

    Saves to `folder` as it goes.
    """
    rng = np.random.default_rng([seed, 1])
    test = demo_clips()[::6]
    both = optimizers(codec, lr)
    began, step, done = time.process_time(), 0, 0.0
    while done < 1:
        done = min(1, (time.process_time() - began) / (60 * minutes))
        _, count, size, frames, kl_weight = next(stage for stage in STAGES if done <= stage[0])
        first = (clips.FRAMES - frames) // 2  # of a single frame, the one where the shape is in the window
        video = batch(rng, count, size)[:, :, first : first + frames]
        with whole_clips():
            mean, logvar = codec.quant_conv(codec.encoder(video)).chunk(2, dim=1)
            latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            difference = codec.decoder(codec.post_quant_conv(latents)) - video
        error = difference.abs().mean() + difference.square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        (error + kl_weight * kl).backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        for optimizer, share in zip(both, (1, 0.25), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * lr * min((step + 1) / 50, 0.01 + 0.99 * math.cos(math.pi / 2 * done) ** 2)
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0:
            quality, seconds = psnr(test, reconstruct(codec, test)), time.process_time() - began
            print(f"{seconds:5.0f} s, step {step:5d}: error {error:.4f}, kl {kl:.3f}, {quality:.2f} dB", flush=True)
            save(codec, folder)
        step += 1
    save(codec, folder)


@torch.no_grad()
def measure_latents(codec: wan.AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel over clips such as the demo's (z_dim each)."""
    latents = torch.cat([codec.encode(v).latent_dist.mode() for v in video.split(8)])
    std = latents.std(dim=(0, 2, 3, 4))
    return latents.mean(dim=(0, 2, 3, 4)), std.clamp(min=SMALLEST_STD * std.max())


def save(codec: wan.AutoencoderKLWan, folder: Path) -> None:
    """The folder that `AutoencoderKLWan.from_pretrained` reads, with the measured statistics in its config."""
    mean, std = measure_latents(codec, demo_clips())
    rounded = {name: [round(v, 4) for v in x.tolist()] for name, x in (("latents_mean", mean), ("latents_std", std))}
    codec.register_to_config(**rounded)
    codec.save_pretrained(folder)


def sheet(rows: list[np.ndarray], path: Path, scale: int = 2) -> None:
    """Clips (uint8 F H W 3) as a picture: one clip per row, its frames side by side."""
    from PIL import Image

    picture = np.concatenate([np.concatenate(list(frames), axis=1) for frames in rows], axis=0)
    Image.fromarray(picture).resize((picture.shape[1] * scale, picture.shape[0] * scale), Image.NEAREST).save(path)


def report(folder: Path, path: Path | None) -> None:
    codec = load_strictly(wan.AutoencoderKLWan, folder, torch.float32)
    video = demo_clips()
    began = time.time()
    restored = reconstruct(codec, video)
    seconds = (time.time() - began) / len(video)
    print(
        f"{psnr(video, restored):.2f} dB over {len(video)} clips, {1000 * seconds:.0f} ms per clip to encode and decode"
    )
    if path:
        pairs = [to_frames(v) for i in range(0, len(video), 11) for v in (video[i], restored[i])]
        sheet(pairs, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=15, help="of CPU time")
    parser.add_argument(
        "--sheet", type=Path, help="do not train: measure the codec in the folder and draw this picture"
    )
    options = parser.parse_args()
    if not options.sheet:
        train(new_codec(), options.folder, options.minutes)
    report(options.folder, options.sheet)


if __name__ == "__main__":
    main()

"""The demo's video VAE: a very small but real diffusers `AutoencoderKLWan` (stride 4×8×8, 16 channels).

    python docs/demo/codec.py docs/demo/codec            # trains it (25 minutes on one core) and writes the folder
    python docs/demo/codec.py docs/demo/codec --sheet codec.png     # only measures it, and draws what it does

The result is shipped in docs/demo/codec, so the demo does not run this. The training clips are more varied than the
demo's (any colour, size, place and velocity), so the codec knows shapes in general, not the demo's data set.
"""

import argparse
import math
import time
from pathlib import Path

import clips
import numpy as np
import torch
from diffusers import AutoencoderKLWan

WINDOW = 32  # most of the training looks through small windows: an epoch of edges for a quarter of the price
KL_WEIGHT = 3e-4  # enough noise on the latents for a smooth space to diffuse in, too little to blur the edges
SMALLEST_STD = 0.25  # of the largest: channels that carry nothing are not blown up to unit variance


def random_clip(rng: np.random.Generator, size: int) -> np.ndarray:
    """uint8 F size size 3: a shape of any colour and velocity that passes somewhere through the window."""
    middle, velocity = rng.uniform(-4, size + 4, 2), rng.uniform(-5, 5, 2)
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


def new_codec(seed: int = 0) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    return AutoencoderKLWan(base_dim=8, num_res_blocks=1)


@torch.no_grad()
def reconstruct(codec: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    return torch.cat([codec.decode(codec.encode(v).latent_dist.mode()).sample for v in video.split(8)])


def psnr(video: torch.Tensor, other: torch.Tensor) -> float:
    """Decibels, of values in [-1, 1]."""
    return 10 * math.log10(4 / (video - other).square().mean().item())


def train(codec: AutoencoderKLWan, folder: Path, minutes: float, lr: float = 2e-3, seed: int = 0) -> None:
    """Reconstruct through noisy latents (absolute error + a little KL); saves to `folder` as it goes."""
    rng = np.random.default_rng([seed, 1])
    test = demo_clips()[::6]
    optimizer = torch.optim.AdamW(codec.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    began, step, done = time.time(), 0, 0.0
    while done < 1:
        done = (time.time() - began) / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 100, 0.01 + 0.99 * math.cos(math.pi / 2 * min(done, 1)) ** 2)
        video = batch(rng, 2, WINDOW if done < 0.85 else clips.SIZE)
        posterior = codec.encode(video).latent_dist
        error = (codec.decode(posterior.sample()).sample - video).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            quality = psnr(test, reconstruct(codec, test))
            print(
                f"{time.time() - began:6.0f} s  step {step:5d}  error {error:.4f}  kl {kl:.3f}  psnr {quality:.2f} dB",
                flush=True,
            )
            save(codec, folder)
        step += 1
    save(codec, folder)


@torch.no_grad()
def measure_latents(codec: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel over clips such as the demo's (z_dim each)."""
    latents = torch.cat([codec.encode(v).latent_dist.mode() for v in video.split(8)])
    std = latents.std(dim=(0, 2, 3, 4))
    return latents.mean(dim=(0, 2, 3, 4)), std.clamp(min=SMALLEST_STD * std.max())


def save(codec: AutoencoderKLWan, folder: Path) -> None:
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
    codec = AutoencoderKLWan.from_pretrained(folder)
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
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument(
        "--sheet", type=Path, help="do not train: measure the codec in the folder and draw this picture"
    )
    options = parser.parse_args()
    if not options.sheet:
        train(new_codec(), options.folder, options.minutes)
    report(options.folder, options.sheet)


if __name__ == "__main__":
    main()

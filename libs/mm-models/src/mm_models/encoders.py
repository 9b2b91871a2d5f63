"""Prompts and videos to what a Wan model reads, and back: UMT5 and the Wan VAE, from a diffusers directory.

The networks are those of transformers and diffusers (`pip install mm-models[encoders]`), imported when first used.
Nothing is downloaded and nothing is random: a missing folder, file or tensor is an error.
"""

import html
import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor


class TextEncoder:
    """UMT5 from `text_encoder/` and `tokenizer/` of a diffusers directory."""

    def __init__(
        self,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        max_length: int = 512,
    ) -> None:
        from transformers import AutoTokenizer, UMT5EncoderModel

        weights, words = _folder(path, "text_encoder"), _folder(path, "tokenizer")
        self.identity = _identity([weights, words], {"dtype": str(dtype), "max_length": max_length})
        self.device, self.max_length = torch.device(device), max_length
        self.tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
        with _no_bar_in_logs():
            model, found = UMT5EncoderModel.from_pretrained(
                weights,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # or the error would not name them; they are refused below
                output_loading_info=True,
            )
        _check_loaded(weights, found)
        self.model = model.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """One tensor S D per prompt, S its true number of tokens with the end mark.

        Prompts go through one by one, without padding: so an encoding depends on its prompt alone, to the last bit. A
        prompt of more than `max_length` tokens is cut, with a warning.
        """
        encoded = []
        for prompt in prompts:
            tokens = self.tokenizer(clean(prompt)).input_ids
            if len(tokens) > self.max_length:
                warnings.warn(
                    f"a prompt of {len(tokens)} tokens was cut to {self.max_length}: {prompt[:60]!r}…", stacklevel=3
                )
                tokens = self.tokenizer(clean(prompt), truncation=True, max_length=self.max_length).input_ids
            encoded.append(self.model(torch.tensor([tokens], device=self.device)).last_hidden_state[0])
        return encoded


class VideoVAE:
    """The Wan VAE from `vae/` of a diffusers directory."""

    def __init__(
        self,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        tiling: bool = False,
    ) -> None:
        from diffusers import AutoencoderKLWan

        folder = _folder(path, "vae")
        self.identity = _identity([folder], {"dtype": str(dtype), "tiling": tiling})
        self.device, self.dtype = torch.device(device), dtype
        vae, found = AutoencoderKLWan.from_pretrained(
            folder,
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
        _check_loaded(folder, found)
        self.vae = vae.eval().requires_grad_(False).to(self.device)
        if tiling:
            self.vae.enable_tiling()
        config = self.vae.config
        side = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        self.stride = (2 ** sum(config.temperal_downsample), side, side)
        """Frames, rows and columns of pixels per latent."""
        self.mean = torch.tensor(config.latents_mean, device=self.device).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(config.latents_std, device=self.device).view(1, -1, 1, 1, 1)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """C F' h w of a video of this many frames and pixels."""
        time, rows, columns = self.stride
        return self.mean.numel(), (frames - 1) // time + 1, height // rows, width // columns

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video B 3 F H W in [-1, 1] to normalised latents B C F' h w in float32, F' = (F - 1) / 4 + 1: the mode of the
        posterior, so no chance is involved. Raises ValueError for a size that the VAE would have to crop.
        """
        time, height, width = self.stride
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video has shape {tuple(video.shape)}, but must be B 3 F H W")
        frames, rows, columns = video.shape[2:]
        if (frames - 1) % time:
            raise ValueError(f"{frames} frames: must be {time}k + 1, e.g. {(frames - 1) // time * time + 1}")
        if rows % height or columns % width:
            raise ValueError(
                f"frames of {rows}x{columns} pixels: both must be multiples of {height}, "
                f"e.g. {rows // height * height}x{columns // width * width}"
            )
        latents = self.vae.encode(video.to(self.device, self.dtype)).latent_dist.mode()
        return (latents.float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents B C F' h w to video B 3 F H W in [-1, 1], float32."""
        latents = latents.to(self.device).float() * self.std + self.mean
        return self.vae.decode(latents.to(self.dtype), return_dict=False)[0].float()

    def frames(self, latents: Tensor) -> Tensor:
        """Normalised latents of one video, 1 C F' h w, to what is written to a file: F H W 3, uint8 on the CPU."""
        video = self.decode(latents)[0].clamp(-1, 1)
        return ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous().cpu()


def clean(prompt: str) -> str:
    """A prompt as the Wan pipelines clean it: broken unicode mended, HTML entities read, white space collapsed."""
    import ftfy

    prompt = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", prompt).strip()


def _folder(path: Path | str, name: str) -> Path:
    folder = Path(path) / name
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: {path} should be a diffusers directory with text_encoder/, tokenizer/ and "
            "vae/, e.g. a download of Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    return folder


@contextmanager
def _no_bar_in_logs() -> Iterator[None]:
    """transformers draws its bar also where stderr is a file; there it is off in this block."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _check_loaded(folder: Path, found: dict) -> None:
    problems = {kind: sorted(map(str, found[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, keys in problems.items():
        if keys:
            raise ValueError(
                f"{folder}: {len(keys)} {kind.replace('_', ' ')}, first {', '.join(keys[:3])}: "
                "the weights do not belong to this config.json, or a file is incomplete"
            )


def _identity(folders: list[Path], options: dict) -> str:
    """A hash that changes with the configuration or the weights; cheap: of a large file, its size and 16 samples."""
    digest = sha256(json.dumps(options, sort_keys=True).encode())
    block = 1 << 16
    for folder in folders:
        for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".model", ".safetensors")):
            size = file.stat().st_size
            digest.update(f"{folder.name}/{file.name}:{size}".encode())
            with open(file, "rb") as stream:
                for i in range(16):
                    stream.seek(max(0, size - block) * i // 15)
                    digest.update(stream.read(block))
    return digest.hexdigest()

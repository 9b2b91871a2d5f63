"""Sample videos during training, made by the function that mm_infer calls."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mm_data import write_video
from mm_models.diffusion.sampling import denoise, noise
from mm_models.encoders import TextEncoder, VideoVAE
from mm_models.wan import WanConfig
from mm_parallel import Pipeline
from mm_parallel.mesh import data_rank, speaks
from mm_train.config import Config
from mm_train.optim import EMA
from mm_train.ranks import made_once


class Samples:
    """Draws every prompt of the configuration with the same noise each time, so that videos compare across steps."""

    def __init__(self, config: Config, mesh: DeviceMesh | None, device: torch.device):
        self.config, self.options = config, config.sample
        self.rank, self.ranks = data_rank(mesh)
        self.speaks, self.device = speaks(mesh), device
        if not self.options.prompts:
            return
        self.texts = made_once(self._encode)  # by one rank: the text encoder may be larger than the model

    def _encode(self) -> list[torch.Tensor]:
        dtype = getattr(torch, self.config.dtype)
        encoder = TextEncoder(self.options.encoders, device=self.device, dtype=dtype)
        # "" is what guidance pushes away from
        return [text.cpu() for text in encoder.encode([*self.options.prompts, ""])]

    def due(self, step: int) -> bool:
        return bool(self.options.prompts) and (step % self.options.every == 0 or step == self.config.steps)

    def __call__(self, run: nn.Module | Pipeline, model: nn.Module, ema: EMA | None, step: int) -> Path:
        """Write this rank's share of the videos; returns their directory. Uses the averaged weights where there are
        some.
        """
        directory = self.config.run_dir / "samples" / f"step-{step:08d}"
        directory.mkdir(parents=True, exist_ok=True)
        vae = VideoVAE(self.options.encoders, device=self.device, dtype=torch.float32)
        count = len(self.options.prompts)
        with ema.applied(model) if ema else nullcontext():
            # A sharded model is run by all ranks together: those without a prompt left repeat one and throw it away.
            for start in range(0, count, self.ranks):
                number = start + self.rank
                latents = self._denoise(run, model.config, vae, self.texts[min(number, count - 1)])
                if number < count and self.speaks:
                    made_with = asdict(self.options) | {"prompt": self.options.prompts[number], "step": step}
                    made_with["encoders"] = str(self.options.encoders)
                    frames = vae.frames(latents).numpy()
                    write_video(directory / f"{number:03d}.mp4", frames, self.options.fps, made_with)
        return directory

    def _denoise(
        self, model: nn.Module | Pipeline, config: WanConfig, vae: VideoVAE, text: torch.Tensor
    ) -> torch.Tensor:
        o = self.options
        return denoise(
            model,
            noise(o.seed, vae.latent_shape(o.frames, o.height, o.width), self.device)[None],
            text[None].to(self.device),
            self.texts[-1][None].to(self.device),
            config=config,
            steps=o.steps,
            guidance=o.guidance,
            flow_shift=o.flow_shift,
        )

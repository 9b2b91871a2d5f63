"""Sample videos during training, made by the function that mm_infer calls."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_data import FeatureDataset, write_video
from mm_models.diffusion.sampling import denoise, noise
from mm_models.encoders import TextEncoder, VideoVAE
from mm_models.wan.conditions import Task, references_in, stored
from mm_parallel import Pipeline
from mm_parallel.mesh import data_rank, reports_loss
from mm_train.config import Config
from mm_train.objective import Objective
from mm_train.optim import EMA
from mm_train.ranks import made_once


class Wish(NamedTuple):
    """A video to make, on the CPU."""

    said: str  # the prompt, or the id of a validation sample
    task: Task
    text: Tensor  # S D
    conditions: dict[str, Tensor]
    shape: tuple[int, ...] | None  # of the latents C F H W; None: that of the options


class Samples:
    """Draws every prompt and chosen validation sample with the same noise each time, so that videos compare."""

    def __init__(
        self, config: Config, goal: Objective, mesh: DeviceMesh | None, device: torch.device, dtype: torch.dtype
    ):
        self.config, self.goal, self.options = config, goal, config.sample
        self.rank, self.ranks = data_rank(mesh)
        self.speaks, self.device, self.dtype = reports_loss(mesh), device, dtype
        self.wishes: list[Wish] = []
        if self.options.prompts and stored(goal.model, goal.task):
            raise ValueError(
                f"--sample.prompts: {config.model} makes no video of text alone ({goal.task}); give "
                "--sample.from_validation, which takes captions, images and control from the validation set"
            )
        if self.options.prompts or self.options.from_validation:
            *texts, self.negative = made_once(self._encode)  # by one rank: the encoder may be larger than the model
            said = zip(self.options.prompts, texts, strict=True)
            self.wishes = [Wish(prompt, "t2v", text, {}, None) for prompt, text in said] + self._from_validation()

    def _encode(self) -> list[Tensor]:
        encoder = TextEncoder(self.options.encoders, device=self.device, dtype=self.dtype)
        # "" is what guidance pushes away from
        return [text.cpu() for text in encoder.encode([*self.options.prompts, ""])]

    def _from_validation(self) -> list[Wish]:
        if not self.options.from_validation:
            return []
        data = FeatureDataset(self.config.validation.features)
        wishes = []
        for i in range(min(self.options.from_validation, len(data))):
            sample = data[i]
            conditions = dict(sample["extras"])
            if self.goal.task == "ti2v":
                conditions["first"] = sample["latents"][:, :1]
            wishes.append(
                Wish(sample["id"], self.goal.task, sample["text"][0], conditions, tuple(sample["latents"].shape))
            )
        return wishes

    def due(self, step: int) -> bool:
        return bool(self.wishes) and (step % self.options.every == 0 or step == self.config.steps)

    def __call__(self, run: nn.Module | Pipeline, model: nn.Module, ema: EMA | None, step: int) -> Path:
        """Write this rank's share of the videos; returns their directory. Uses the averaged weights where there are
        some.
        """
        directory = self.config.run_dir / "samples" / f"step-{step:08d}"
        directory.mkdir(parents=True, exist_ok=True)
        vae = VideoVAE(self.options.encoders, device=self.device)
        count = len(self.wishes)
        with ema.applied(model) if ema else nullcontext():
            # A sharded model is run by all ranks together: those without a wish left repeat one and throw it away.
            for start in range(0, count, self.ranks):
                number = start + self.rank
                wish = self.wishes[min(number, count - 1)]
                latents = self._denoise(run, vae, wish)
                if number < count and self.speaks:
                    made_with = asdict(self.options) | {"prompt": wish.said, "step": step}
                    made_with["encoders"] = str(self.options.encoders)
                    frames = vae.frames(latents).numpy()
                    write_video(directory / f"{number:03d}.mp4", frames, self.options.fps, made_with)
        return directory

    def _denoise(self, model: nn.Module | Pipeline, vae: VideoVAE, wish: Wish) -> Tensor:
        o = self.options
        shape = wish.shape or vae.latent_shape(o.frames, o.height, o.width)
        conditions = {name: tensor[None].to(self.device) for name, tensor in wish.conditions.items()}
        latents = denoise(
            model,
            noise(o.seed, shape, self.device)[None],
            wish.text[None].to(self.device),
            self.negative[None].to(self.device),
            config=self.goal.model,
            task=wish.task,
            conditions=conditions,
            steps=o.steps,
            guidance=o.guidance,
            flow_shift=o.flow_shift,
        )
        before = references_in(wish.conditions["control"]) if "control" in wish.conditions else 0
        return latents[:, :, before:]

"""Sample videos during training, made by the function that mm_infer calls."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_convert.cli.terminal import one_line
from mm_data import FeatureDataset, write_video
from mm_models.diffusion.samplers import fill_template
from mm_models.diffusion.sampling import denoise, noise
from mm_models.encoders import Codec, to_frames
from mm_models.objective import Objective
from mm_parallel import Pipeline
from mm_parallel.mesh import data_rank, reports_loss
from mm_train.config import Config
from mm_train.objective import architecture
from mm_train.optim import EMA
from mm_train.ranks import broadcast
from mm_train.sample_adapter import acting, open_sample_adapter
from mm_train.settle import settle_samples
from mm_train.start import outline
from mm_train.turns import Averages


class SampleRequest(NamedTuple):
    """A video to make, on the CPU."""

    name: str  # the prompt, or the id of a validation sample
    task: str
    text: Tensor  # S D
    conditions: dict[str, Tensor]  # 1 …
    shape: tuple[int, ...] | None  # of the latents C F H W; None: that of the options


class Samples:
    """Draws every prompt and chosen validation sample with the same noise each time, so that videos compare."""

    def __init__(
        self, config: Config, objective: Objective, mesh: DeviceMesh | None, device: torch.device, dtype: torch.dtype
    ):
        self.config, self.objective, self.options = config, objective, settle_samples(config)
        self.family, self.shape = architecture(config)
        self.video = self.family.video
        self.stored = self.video.conditioning(self.shape, objective.task).stored
        self.rank, self.ranks = data_rank(mesh)
        self.reports, self.device, self.dtype = reports_loss(mesh), device, dtype
        self.requests: list[SampleRequest] = []
        if self.options.prompts and self.stored:
            raise ValueError(
                f"--sample.prompts: {config.model} makes no video of text alone ({objective.task}); give "
                "--sample.from_validation, which takes captions, images and control from the validation set"
            )
        if self.options.prompts or self.options.from_validation:
            *texts, self.negative = broadcast(self._encode)  # by one rank: the encoder may be larger than the model
            of_text = self.family.tasks(self.shape)[0].name  # the usual one, as the objective stores no conditions
            prompts = zip(self.options.prompts, texts, strict=True)
            self.requests = [SampleRequest(prompt, of_text, text, {}, None) for prompt, text in prompts]
            self.requests += self._from_validation()
        self.adapter = open_sample_adapter(config, outline(config)) if self.requests else None

    def _encode(self) -> list[Tensor]:
        encoder = self.video.text_encoder(self.shape, self.options.encoders, device=self.device, dtype=self.dtype)
        prompts = [fill_template(self.options.prompt_template, prompt) for prompt in self.options.prompts]
        return [text.cpu() for text in encoder.encode([*prompts, self.options.negative_prompt])]

    def _from_validation(self) -> list[SampleRequest]:
        if not self.options.from_validation:
            return []
        data = FeatureDataset(self.config.validation.features)
        requests = []
        for i in range(min(self.options.from_validation, len(data))):
            sample = data[i]
            conditions = {name: sample["conditions"][name][None] for name in self.stored}
            latents, task = sample["latents"], self.objective.task
            conditions = dict(self.video.conditioning(self.shape, task).complete(latents[None], conditions))
            requests.append(SampleRequest(sample["id"], task, sample["text"][0], conditions, tuple(latents.shape)))
        return requests

    def due(self, step: int) -> bool:
        return bool(self.requests) and (step % self.options.every == 0 or step == self.config.steps)

    def __call__(self, model: nn.Module | Pipeline, average: EMA | Averages, step: int) -> str:
        """Write this rank's share of the videos; returns what to tell of them. Uses the averaged weights where there
        are some, with the adapter of samples in them.
        """
        directory = self.config.run_dir / "samples" / f"step-{step:08d}"
        directory.mkdir(parents=True, exist_ok=True)
        tiling = self.video.choose_tiling(None, "inference")
        codec = self.video.codec(self.options.encoders, device=self.device, tiling=tiling)
        count = len(self.requests)
        with average.apply(), acting(self.adapter, average.model):
            # A sharded model is run by all ranks together: those without a request left repeat one and throw it away.
            for start in range(0, count, self.ranks):
                number = start + self.rank
                request = self.requests[min(number, count - 1)]
                latents = self._denoise(model, codec, request)
                if number < count and self.reports:
                    made_with = asdict(self.options) | {"prompt": request.name, "step": step}
                    made_with |= {name: str(path) for name, path in made_with.items() if isinstance(path, Path)}
                    made_with |= {"vae_tiling": tiling}
                    frames = to_frames(codec, latents).numpy()
                    write_video(directory / f"{number:03d}.mp4", frames, self.options.fps, made_with)
        return f"samples in {one_line(directory)}"

    def _denoise(self, model: nn.Module | Pipeline, codec: Codec, request: SampleRequest) -> Tensor:
        o = self.options
        shape = request.shape or codec.latent_shape(o.frames, o.height, o.width)
        conditions = {name: tensor.to(self.device) for name, tensor in request.conditions.items()}
        conditioning = self.video.conditioning(self.shape, request.task)
        latents = denoise(
            model,
            noise(o.seed, shape, self.device)[None],
            request.text[None].to(self.device),
            self.negative[None].to(self.device),
            conditioning=conditioning,
            conditions=conditions,
            steps=o.steps,
            guidance=o.guidance,
            prediction=self.video.prediction(self.shape),
            sampler=o.sampler,
            flow_shift=o.flow_shift,
            seeds=[o.seed],
        )
        return latents[:, :, conditioning.frames_before(request.conditions) :]

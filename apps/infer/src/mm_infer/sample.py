"""From a prompt to a video: encode what is given, denoise, decode. One part is loaded after the other."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mm_infer import parts
from mm_infer.checks import blame, first_latents
from mm_infer.config import Options
from mm_infer.encode import Encoders
from mm_infer.inputs import Given
from mm_infer.plan import plan, start_of
from mm_infer.weights import Weights
from mm_models import plan as parallel_plan
from mm_models.diffusion.sampling import Experts, denoise, partly_noised
from mm_models.wan import WanModel
from mm_parallel import context
from mm_parallel.device import bf16_ok, synchronize
from mm_parallel.device import device as accelerator


@dataclass(frozen=True)
class Result:
    """A video, and what it took."""

    latents: Tensor  # B C F H W with B = 1, float32 on the CPU, normalised as the model sees them
    frames: Tensor  # F H W 3, uint8 on the CPU
    seconds: dict[str, float]  # by stage: text, inputs, load, denoise, decode
    options: Options  # all of them, with what was left to the defaults


def load(
    path: Path | str,
    encoders: Path | str | None = None,
    *,
    model: str | None = None,
    lora: Path | str | None = None,
    boundary: float | None = None,
    offload: bool | None = None,
    dtype: torch.dtype | None = None,
    vae_tiling: bool = False,
    text_tokens: int | None = None,
    device: torch.device | str | None = None,
    mesh: DeviceMesh | None = None,
    pair: dist.ProcessGroup | None = None,
) -> "Sampler":
    """A sampler for weights on disk; the arguments are the flags of the same names (see `mm_infer.config.Config`).

    Names, shapes and paths are checked here; tensors are read when they are first needed. ValueError for parts that are
    missing or do not fit together.

    mesh: of `mm_parallel.ParallelConfig`, with cp > 1 to share the tokens among its context ranks. pair: a group of two
    ranks that share the passes of guidance. All ranks of both then make the same calls, and get the same latents.
    """
    path = parts.must_exist(Path(path), "weights")
    encoders = None if encoders is None else parts.must_exist(Path(encoders), "encoders")
    lora = None if lora is None else parts.must_exist(Path(lora), "lora")
    weights = Weights(path, model, lora, text_tokens, boundary)
    encoders = parts.find_encoders(path, encoders, image=weights.config.image_dim is not None)
    config = parts.fitted(weights.config, encoders)
    device = accelerator() if device is None else torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type != "cpu" and bf16_ok(device) else torch.float32
    if offload is not None and len(weights.experts) == 1:
        raise ValueError(f"offload is for two experts, of which one rests, but {path} holds one model: leave it out")
    offload = device.type != "cpu" if offload is None else offload
    return Sampler(weights, Encoders(encoders, config, device, dtype, vae_tiling), offload, model, mesh, pair)


class Sampler:
    """`sampler(prompt, ...) -> Result`. Made by `load`.

    The text encoder, the largest part of a small Wan, is in memory only while it encodes: `encode` all prompts first,
    if there are several, so that it is loaded once; likewise CLIP, with `encoders.see_all`. The transformer and the
    VAE stay once they have been needed.
    """

    def __init__(
        self,
        weights: Weights,
        encoders: Encoders,
        offload: bool = False,
        preset: str | None = None,
        mesh: DeviceMesh | None = None,
        pair: dist.ProcessGroup | None = None,
    ) -> None:
        self.weights, self.encoders, self.preset = weights, encoders, preset
        self.config, self.device, self.dtype = encoders.config, encoders.device, encoders.dtype
        self.offload, self.mesh, self.pair = offload, mesh, pair
        self._model: WanModel | Experts | None = None

    def __call__(
        self,
        prompt: str,
        *,
        latents: Tensor | None = None,
        progress: Callable[[int, Tensor], None] | None = None,
        **options,
    ) -> Result:
        """Makes one video; the same prompt and options always make the same one, whatever was made before.

        Args:
            latents: initial noise, B C F H W with B = 1, for VACE with a frame in front for each reference; by default
                drawn from `seed`.
            progress: called after each step with the number of steps done and the latents.
            options: fields of `mm_infer.inputs.Given` (image, last_image, video, mask, references: paths, or uint8
                H W 3 and F H W 3) and of `mm_infer.config.Options` (task, negative_prompt, height, width, frames, fps,
                steps, guidance, flow_shift, sampler, grid, seed, strength, control_scale).

        Raises:
            ValueError: an option that is unknown or out of range, a task that the model cannot do, a broken file.
            FloatingPointError: the latents are not finite, so there is no video to see.
        """
        known = [field.name for field in (*fields(Given), *fields(Options))]
        for name in options:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                raise ValueError(f"there is no option {name}" + (f", did you mean {near[0]}?" if near else ""))
        given = Given(**{field.name: options.pop(field.name) for field in fields(Given) if field.name in options})
        return self.run(prompt, self.plan(Options(**options), given), given, latents, progress)

    def plan(self, options: Options, given: Given) -> Options:
        """The options with nothing left open; see `mm_infer.plan`."""
        return plan(
            options,
            given,
            self.config,
            experts=len(self.weights.experts) > 1,
            model=self.preset,
            ti2v=parts.keeps_first_frame(self.encoders.path, self.config),
            multiple=parts.pixels_per_latent(self.encoders.path) * self.config.patch_size[1],
        )

    def run(
        self,
        prompt: str,
        options: Options,
        given: Given,
        latents: Tensor | None = None,
        progress: Callable[[int, Tensor], None] | None = None,
        decode: bool = True,
    ) -> Result:
        """The same with all options, as `plan` gives them; without `decode`, with no frames."""
        seconds: dict[str, float] = {}
        negative = [options.negative_prompt] if max(options.scales) > 1 else []
        with self._timed(seconds, "text"):
            text, *away = [t[None].to(self.device) for t in self.encode([prompt, *negative])]
        with self._timed(seconds, "inputs"):
            made_from = self.encoders.conditions(given, options)
        with self._timed(seconds, "load"):
            if self._model is None:
                self._model = self.weights.load(self.config, self.device, self.dtype, self.offload, self._cut)
        references, start = len(given.references), start_of(options)
        latents = first_latents(latents, options, self.encoders.vae, references).to(self.device)
        schedule = {name: getattr(options, name) for name in ("steps", "flow_shift", "sampler", "grid")}
        if options.task == "v2v":
            latents = partly_noised(made_from["video"], latents, start, **schedule)
        with self._timed(seconds, "denoise"):
            latents = denoise(
                self._model,
                latents,
                text,
                *away,
                config=self.config,
                task=options.task,
                conditions=made_from,
                control_scale=options.control_scale,
                guidance=options.scales,
                start=start,
                progress=progress,
                pair=self.pair,
                **schedule,
            )[:, :, references:]
        if not latents.isfinite().all():
            cause = blame({"text": text} | made_from, self._model, self.encoders)
            raise FloatingPointError(
                f"the latents for {prompt!r} came out as NaN or infinite, so there is no video: {cause}"
            )
        with self._timed(seconds, "decode"):
            nothing = torch.empty(0, options.height, options.width, 3).byte()
            frames = self.encoders.vae.frames(latents) if decode else nothing
        return Result(latents.cpu(), frames, seconds, options)

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """The encodings of prompts, S D each on the CPU, remembered; the text encoder is gone again afterwards."""
        return self.encoders.texts(prompts)

    def _cut(self, model: WanModel) -> None:
        if self.mesh is not None:
            context.cut(model, parallel_plan(model), self.mesh)

    @contextmanager
    def _timed(self, seconds: dict[str, float], stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        synchronize(self.device)
        seconds[stage] = time.perf_counter() - start

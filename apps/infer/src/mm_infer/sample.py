"""From a prompt to a video: encode the text, denoise, decode. One part of the pipeline is loaded after the other."""

import gc
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

from mm_infer.config import Options
from mm_infer.weights import Transformer, find_encoders, must_exist
from mm_models import plan
from mm_models.diffusion.sampling import denoise, noise
from mm_models.encoders import TextEncoder, VideoVAE
from mm_parallel import context
from mm_parallel.device import bf16_ok, synchronize
from mm_parallel.device import device as accelerator


@dataclass(frozen=True)
class Result:
    """A video, and what it took."""

    latents: Tensor  # B C F H W with B = 1, float32 on the CPU, normalised as the model sees them
    frames: Tensor  # F H W 3, uint8 on the CPU
    seconds: dict[str, float]  # by stage: text, load, denoise, decode


def load(
    path: Path | str,
    encoders: Path | str | None = None,
    *,
    model: str | None = None,
    lora: Path | str | None = None,
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
    path = must_exist(Path(path), "weights")
    encoders = find_encoders(path, None if encoders is None else must_exist(Path(encoders), "encoders"))
    lora = None if lora is None else must_exist(Path(lora), "lora")
    transformer = Transformer(path, model, lora, text_tokens)
    device = accelerator() if device is None else torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type != "cpu" and bf16_ok(device) else torch.float32
    return Sampler(transformer, encoders, device, dtype, vae_tiling, mesh, pair)


class Sampler:
    """`sampler(prompt, ...) -> Result`. Made by `load`.

    The text encoder, the largest part of a small Wan, is in memory only while it encodes: `encode` all prompts first,
    if there are several, so that it is loaded once. The transformer and the VAE stay once they have been needed.
    """

    def __init__(
        self,
        transformer: Transformer,
        encoders: Path,
        device: torch.device,
        dtype: torch.dtype,
        vae_tiling: bool,
        mesh: DeviceMesh | None = None,
        pair: dist.ProcessGroup | None = None,
    ) -> None:
        self.mesh, self.pair = mesh, pair
        self.transformer, self.encoders = transformer, encoders
        self.device, self.dtype, self.vae_tiling = device, dtype, vae_tiling
        self._texts: dict[str, Tensor] = {}  # S D on the CPU
        self._model = self._vae = None

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
            latents: initial noise, B C F H W with B = 1; by default drawn from `seed`.
            progress: called after each step with the number of steps done and the latents.
            options: fields of `mm_infer.config.Options`: negative_prompt, height, width, frames, steps, guidance,
                flow_shift, sampler, grid, seed.

        Raises:
            ValueError: an option that is unknown or out of range.
            FloatingPointError: the latents are not finite, so there is no video to see.
        """
        return self.run(prompt, _options(options), latents, progress)

    def run(
        self,
        prompt: str,
        options: Options,
        latents: Tensor | None = None,
        progress: Callable[[int, Tensor], None] | None = None,
        decode: bool = True,
    ) -> Result:
        """The same with the options in one piece; without `decode`, with no frames."""
        seconds: dict[str, float] = {}
        negative = options.negative_prompt if options.guidance > 1 else None
        with self._timed(seconds, "text"):
            texts = self.encode([prompt] if negative is None else [prompt, negative])
            text, away = ([t[None].to(self.device) for t in texts] + [None])[:2]
        with self._timed(seconds, "load"):
            model, vae = self._load()
        shape = self._latent_shape(options)
        if latents is None:
            latents = noise(options.seed, shape[1:])[None]
        elif tuple(latents.shape) != shape:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, but {options.frames} frames of "
                f"{options.height}x{options.width} need {shape}"
            )
        with self._timed(seconds, "denoise"):
            latents = denoise(
                model,
                latents.to(self.device),
                text,
                away,
                config=self.transformer.config,
                steps=options.steps,
                guidance=options.guidance,
                flow_shift=options.flow_shift,
                sampler=options.sampler,
                grid=options.grid,
                progress=progress,
                pair=self.pair,
            )
        if not latents.isfinite().all():
            raise FloatingPointError(
                f"the latents for {prompt!r} came out as NaN or infinite, so there is no video: {self._blame(text)}"
            )
        with self._timed(seconds, "decode"):
            frames = vae.frames(latents) if decode else torch.empty(0, options.height, options.width, 3).byte()
        return Result(latents.cpu(), frames, seconds)

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """The encodings of prompts, S D each on the CPU, remembered; the text encoder is gone again afterwards."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            encoder = TextEncoder(self.encoders, self.device, self.dtype, self.transformer.config.text_tokens)
            texts = encoder.encode(new)  # one by one, so that an encoding depends on its prompt alone
            self._texts |= {prompt: text.cpu() for prompt, text in zip(new, texts, strict=True)}
            del encoder
            gc.collect()
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()
        return [self._texts[prompt] for prompt in prompts]

    def _load(self):
        if self._model is None:
            self._model = self.transformer.load(self.device, self.dtype)
            if self.mesh is not None:
                context.cut(self._model, plan(self._model), self.mesh)
        if self._vae is None:
            self._vae = VideoVAE(self.encoders, self.device, torch.float32, tiling=self.vae_tiling)
        return self._model, self._vae

    def _blame(self, text: Tensor) -> str:
        """The likely cause of latents that are not finite."""
        if not text.isfinite().all():
            return f"the text encoder's output is not finite already: look at the weights in {self.encoders}"
        broken = [name for name, p in self._model.named_parameters() if not p.isfinite().all()]
        if broken:
            return f"{len(broken)} tensors of the weights hold such values, first {broken[0]}: take other weights"
        return f"the weights are finite, but the model overflows in {self.dtype} with this prompt and these options"

    def _latent_shape(self, options: Options) -> tuple[int, ...]:
        return (1, *self._vae.latent_shape(options.frames, options.height, options.width))

    @contextmanager
    def _timed(self, seconds: dict[str, float], stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        synchronize(self.device)
        seconds[stage] = time.perf_counter() - start


def _options(given: dict) -> Options:
    known = [field.name for field in fields(Options)]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ValueError(f"there is no option {name}" + (f", did you mean {near[0]}?" if near else ""))
    return Options(**given)

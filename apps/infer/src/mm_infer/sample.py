"""From a prompt to a video: encode what is given, denoise, decode. One part is loaded after the other."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_infer.config import Options
from mm_infer.encode import Encoders
from mm_infer.inputs import Given
from mm_infer.settle import settle, start_of
from mm_infer.weights import Weights
from mm_models.diffusion.experts import Experts
from mm_models.diffusion.first_block import FirstBlockCache
from mm_models.diffusion.samplers import fill_template
from mm_models.diffusion.sampling import denoise, noise, partly_noised
from mm_models.encoders import to_frames
from mm_models.family import AskedTiling
from mm_parallel import context
from mm_parallel.attention import choose_core, describe_choice
from mm_parallel.config import AttentionName, Base, MemoryConfig
from mm_parallel.device import bf16_ok, synchronize
from mm_parallel.device import device as accelerator


@dataclass(frozen=True)
class Result:
    """A video, and what it took."""

    latents: Tensor  # B C F H W with B = 1, float32 on the CPU, normalised as the model sees them
    frames: Tensor  # F H W 3, uint8 on the CPU
    seconds: dict[str, float]  # by stage: text, inputs, load, denoise, decode
    options: Options  # all of them, with what was left to the defaults
    skipped: float = 0.0  # share of the model's calls that the first block cache has answered


def load(
    path: Path | str,
    encoders: Path | str | None = None,
    *,
    model: str | None = None,
    lora: Path | str | Sequence[Path | str] | None = None,
    lora_strength: float | Sequence[float] = 1.0,
    lora_alpha: float | None = None,
    boundary: float | None = None,
    offload: bool | None = None,
    dtype: torch.dtype | None = None,
    vae_tiling: AskedTiling = None,
    text_tokens: int | None = None,
    device: torch.device | str | None = None,
    compile: bool = False,
    mesh: DeviceMesh | None = None,
    pair: dist.ProcessGroup | None = None,
    attention: AttentionName = "auto",
    base: Base = "dtype",
    host_layers: int = 0,
) -> "Sampler":
    """A sampler for weights on disk; the arguments are the flags of the same names (see `mm_infer.config.Config`).

    Names, shapes and paths are checked here; tensors are read when they are first needed. ValueError for parts that are
    missing or do not fit together.

    mesh: of `mm_parallel.ParallelConfig`, with cp > 1 to share the tokens among its context ranks. pair: a group of two
    ranks that share the passes of guidance. All ranks of both then make the same calls, and get the same latents.
    """
    adapter = {"lora": lora, "lora_strength": lora_strength, "lora_alpha": lora_alpha}
    weights = Weights(path, encoders, model=model, text_tokens=text_tokens, boundary=boundary, **adapter)
    how = {"vae_tiling": vae_tiling, "attention": attention, "compile": compile, "mesh": mesh, "pair": pair}
    how |= {"base": base, "host_layers": host_layers}
    return Sampler(weights, device, dtype, offload, **how)


class Sampler:
    """`sampler(prompt, ...) -> Result`. Made by `load`.

    The text encoder, often larger than the model, is in memory only while it encodes: `encode` all prompts first, if
    there are several, so that it is loaded once; likewise the image encoder, with `encoders.see_all`. The transformer
    and the VAE stay once they have been needed.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        offload: bool | None = None,
        *,
        vae_tiling: AskedTiling = None,
        compile: bool = False,
        mesh: DeviceMesh | None = None,
        pair: dist.ProcessGroup | None = None,
        attention: AttentionName = "auto",
        base: Base = "dtype",
        host_layers: int = 0,
    ) -> None:
        """See `load`."""
        self.weights, self.family, self.config = weights, weights.facts.family, weights.facts.config
        self.device = accelerator() if device is None else torch.device(device)
        on_host = self.device.type == "cpu"
        usual = torch.bfloat16 if not on_host and bf16_ok(self.device) else torch.float32
        self.dtype = usual if dtype is None else dtype
        if offload is not None and not weights.facts.experts:
            raise ValueError(
                f"offload is for two experts, of which one rests, but {weights.path} holds one model: leave it out"
            )
        self.offload = not on_host if offload is None else offload
        self.mesh, self.pair, self.attention, self.compile = mesh, pair, attention, compile
        self.memory = MemoryConfig(base=base, host_layers=host_layers)
        weights.check_held(self.memory, self.device)
        self.kernel = self._describe_attention()
        if compile:
            from mm_parallel.compile import check_compiler

            check_compiler(self.device.type)
        self.encoders = Encoders(weights.facts, self.device, self.dtype, vae_tiling)
        self._model: nn.Module | None = None

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
            latents: initial noise, B C F H W with B = 1, with the frames that stand before the video (references);
                by default drawn from `seed`.
            progress: called after each step with the number of steps done and the latents.
            options: fields of `mm_infer.inputs.Given` (image, last_image, video, mask, references: paths, or uint8
                H W 3 and F H W 3) and of `mm_infer.config.Options` (task, negative_prompt, height, width, frames, fps,
                steps, guidance, flow_shift, sampler, grid, seed, strength, control_scale, prompt_template,
                other_frames).

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
        return self.run(prompt, self.settle(Options(**options), given), given, latents, progress)

    def settle(self, options: Options, given: Given) -> Options:
        """The options with nothing left open; see `mm_infer.settle`."""
        return settle(options, given, self.weights.facts)

    def run(
        self,
        prompt: str,
        options: Options,
        given: Given,
        latents: Tensor | None = None,
        progress: Callable[[int, Tensor], None] | None = None,
        decode: bool = True,
    ) -> Result:
        """The same with all options, as `settle` gives them; without `decode`, with no frames."""
        seconds: dict[str, float] = {}
        conditioning = self.family.video.conditioning(self.config, options.task)
        negative = [options.negative_prompt] if max(options.scales) > 1 else []
        with self._timed(seconds, "text"):
            texts = self.encode([fill_template(options.prompt_template, prompt), *negative])
            text, *away = [text[None].to(self.device) for text in texts]
        with self._timed(seconds, "inputs"):
            conditions = self.encoders.conditions(conditioning, given, options)
        with self._timed(seconds, "load"):
            if self._model is None:
                self._model = self.weights.load(self.device, self.dtype, self.offload, self._cut, self.memory)
        before, start = conditioning.frames_before(conditions), start_of(options)
        latents = self._first_latents(latents, options, before).to(self.device)
        schedule = {name: getattr(options, name) for name in ("steps", "flow_shift", "sampler", "grid")}
        if options.strength is not None:  # it begins from another video
            latents = partly_noised(conditions["clean"], latents, start, **schedule)
        own = self.family.task(self.config, options.task).options
        cache = self._cache(options)
        models = (self._model.high, self._model.low) if isinstance(self._model, Experts) else (self._model,)
        with self._timed(seconds, "denoise"), nullcontext() if cache is None else cache.on(*models):
            latents = denoise(
                self._model,
                latents,
                text,
                *away,
                conditioning=conditioning,
                conditions=conditions,
                arguments={name: getattr(options, name) for name in own if name != "strength"},
                guidance=options.scales,
                prediction=self.weights.facts.prediction,
                seeds=[options.seed],
                start=start,
                progress=progress,
                pair=self.pair,
                cache=cache,
                **schedule,
            )[:, :, before:]
        if not latents.isfinite().all():
            cause = self._diagnose({"text": text} | conditions)
            raise FloatingPointError(
                f"the latents for {prompt!r} came out as NaN or infinite, so there is no video: {cause}"
            )
        with self._timed(seconds, "decode"):
            nothing = torch.empty(0, options.height, options.width, 3).byte()
            frames = to_frames(self.encoders.codec, latents) if decode else nothing
        return Result(latents.cpu(), frames, seconds, options, cache.skipped / cache.calls if cache else 0.0)

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """The encodings of prompts, S D each on the CPU, remembered; the text encoder is gone again afterwards."""
        return self.encoders.texts(prompts)

    def _first_latents(self, given: Tensor | None, options: Options, before: int) -> Tensor:
        """Noise, 1 C F H W with this many frames before the video: drawn from the seed, or what was given.

        ValueError if that has another shape.
        """
        channels, frames, *size = self.encoders.codec.latent_shape(options.frames, options.height, options.width)
        shape = (channels, before + frames, *size)
        if given is None:
            return noise(options.seed, shape)[None]
        if tuple(given.shape) != (1, *shape):
            more = f" and {before} references" if before else ""
            raise ValueError(
                f"latents have shape {tuple(given.shape)}, but {options.frames} frames of "
                f"{options.height}x{options.width}{more} need {(1, *shape)}"
            )
        return given

    def _cache(self, options: Options) -> FirstBlockCache | None:
        if options.first_block_cache is None:
            return None
        shared = context.Context(self.mesh).groups.get("cp") if self.mesh is not None else None

        def total(sums: Tensor) -> Tensor:
            if shared is not None:
                dist.all_reduce(sums, group=shared)
            return sums

        return FirstBlockCache(options.first_block_cache, total)

    def _diagnose(self, told: Mapping[str, Tensor]) -> str:
        """The likely cause of latents that are not finite; told: text and conditions."""
        for name, tensor in told.items():
            if not tensor.isfinite().all():
                maker = "the text encoder's output" if name == "text" else f"what was encoded of the inputs ({name})"
                return f"{maker} is not finite already: look at the weights in {self.encoders.path}"
        broken = [name for name, p in self._model.named_parameters() if not p.isfinite().all()]
        if broken:
            return f"{len(broken)} tensors of the weights hold such values, first {broken[0]}: take other weights"
        return f"the weights are finite, but the model overflows in {self.dtype} with this prompt and these options"

    def _describe_attention(self) -> str:
        """The kernel of attention, in a few words. ValueError for one that cannot run here."""
        with torch.device("meta"):
            plan = self.family.plan(self.family.build(self.config))
        return describe_choice(self.attention, plan, self.device, self.dtype, self.mesh)

    def _cut(self, model: nn.Module) -> None:
        plan = self.family.plan(model)
        choose_core(model, plan, self.attention)
        if self.mesh is not None:
            context.cut(model, plan, self.mesh, self.attention)
        if self.compile:
            from mm_parallel.compile import compile_layers  # with torch's compiler, which takes seconds to import

            compile_layers(model, plan)

    @contextmanager
    def _timed(self, seconds: dict[str, float], stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        synchronize(self.device)
        seconds[stage] = time.perf_counter() - start

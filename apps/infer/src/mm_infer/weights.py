"""Which model lies at a path, what is known of it before a tensor is read, and how it is filled.

This file imports no torch before a model is made (or a LoRA compared): wrong weights are refused at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert import Adapter, Checkpoint, expert_of, open_checkpoint, open_experts
from mm_convert.cli.terminal import one_line
from mm_convert.cli.values import check_fields, check_value
from mm_convert.lora.base import check_base, describe_content
from mm_infer.config import Boundary
from mm_infer.loras import EXPERTS, Lora, read_loras
from mm_models.distilled import find_distilled, settle_distilled
from mm_models.families import family_of_weights, find, published_like
from mm_models.family import Distilled, Family, Published
from mm_models.folder import check_parts
from mm_parallel.config import MemoryConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mm_models.diffusion.experts import Experts


@dataclass(frozen=True)
class Facts:
    """What is known of a model before a tensor of it is read."""

    family: Family
    config: Any
    """The architecture, fitted to the encoders."""
    experts: bool
    """Whether there are two, which share the noise levels."""
    published: Published
    """What these weights, or those they are most like, were published with; of the size that these say, and of the
    steps that a distilled adapter is known for.
    """
    repository: Path
    """The diffusers directory of the encoders."""
    distilled: Distilled | None = None
    """What weights or adapters are known for by their name."""

    @property
    def prediction(self) -> str:
        """What the model predicts: "flow", "epsilon" or "v_prediction"."""
        return self.family.video.prediction(self.config)


class Weights:
    """A model, or two experts of one architecture, and its encoders. Names and shapes are compared; no tensor is read
    yet."""

    def __init__(
        self,
        path: Path | str,
        encoders: Path | str | None = None,
        *,
        model: str | None = None,
        lora: Path | str | Sequence[Path | str] | None = None,
        lora_strength: float | Sequence[float] = 1.0,
        lora_alpha: float | None = None,
        text_tokens: int | None = None,
        boundary: float | None = None,
    ) -> None:
        """The arguments are the flags of the same names (see `mm_infer.config.Config`).

        ValueError for a path that is not there, for files that do not hold exactly the tensors of a model, or of two
        that are alike, and for encoders that are missing or do not fit.
        """
        named = None if model is None else find(model)[1]
        self.path = path = must_exist(Path(path), "weights")
        encoders = None if encoders is None else must_exist(Path(encoders), "encoders")
        loras = read_loras(lora, lora_strength, lora_alpha)
        self.experts, said = open_transformers(path, model, loras, boundary)
        family, config = self.experts[0].family, self.experts[0].config
        two = len(self.experts) > 1
        like = named if named and (named.boundary is not None) == two else published_like(config, two)
        self.boundary = (said or like.boundary) if two else None
        """Noise level from which on the first of two experts works."""
        if two and self.boundary is None:
            raise ValueError(
                f"{path} holds two experts, but nothing says from which noise level on the first one works: give it, "
                "as boundary 0.875"
            )
        if text_tokens is not None:
            config = replace(config, text_tokens=text_tokens)
        repository = find_encoders(path, encoders, family, config)
        distilled = find_known(family, path, loras, two)
        published = settle_distilled(family.video.sized(like.published, config), distilled)
        self.facts = Facts(family, family.video.fit(config, repository), two, published, repository, distilled)

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        offload: bool = False,
        each: Callable[[nn.Module], None] = lambda model: None,
        memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
    ) -> nn.Module | Experts:
        """On the device (of two experts with `offload`, the second on the host); `each` is called for every one.

        memory: how matrices are held, see `mm_parallel.frozen`.
        """
        from mm_models.diffusion.experts import Experts

        models: list[nn.Module] = []
        for number, expert in enumerate(self.experts):
            host = "cpu" if number and offload else device
            models.append(expert.load(self.facts.config, host, dtype, memory))
            each(models[-1])
        return models[0] if len(models) == 1 else Experts(*models, self.boundary, offload)

    def check_held(self, memory: MemoryConfig, device: torch.device) -> None:
        """Raise ValueError where the matrices cannot be held so on this device."""
        if memory.holds_frozen:
            from mm_parallel.frozen import check_frozen
            from mm_parallel.quantise import check_device

            check_device(memory.base, device)
            outline = self.experts[0].outline(self.facts.config)
            check_frozen(outline, self.facts.family.plan(outline), memory, tp=1)


class Transformer:
    """A checkpoint whose names and shapes are known to be those of a model, and whose tensors are not read yet."""

    def __init__(self, path: Path, model: str | None, loras: Sequence[Lora] = (), expert: str = "") -> None:
        """expert: "high" or "low", of two. ValueError unless the files hold exactly the tensors of a model."""
        self.checkpoint, self.expert = open_checkpoint(path), expert
        self.adapters = [(lora, lora.open(expert)) for lora in loras]
        self.family = family_of_weights(self.checkpoint.family)
        self.family.need_video(f"give `python -m mm_infer.chat --weights {path} --prompt …`")
        self.config = read_architecture(path, self.family, self.checkpoint, model)
        for note in self.checkpoint.notes:
            print(one_line(f"{path}: {note}"), file=sys.stderr)
        if self.adapters:
            self._check_adapters()

    def load(
        self,
        config: Any,
        device: torch.device | str,
        dtype: torch.dtype,
        memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
    ) -> nn.Module:
        """The model on the device, in `dtype` except what is kept in fp32, read tensor by tensor.

        config: that of the weights, fitted to the encoders. memory: how matrices are held.
        """
        import torch

        from mm_parallel import load_parameters
        from mm_parallel.frozen import hold_frozen

        model, device = self.outline(config, dtype), torch.device(device)
        hold_frozen(model, self.family.plan(model), memory)
        load_parameters(model, self.checkpoint, device)
        self._adapt(model)
        if memory.holds_frozen:
            model.to(device)  # adapters, which lie where the matrices beside them are, if these are parameters
        return model.eval().requires_grad_(False)

    def outline(self, config: Any, dtype: torch.dtype | None = None) -> nn.Module:
        """The model without values, of which nothing is trained."""
        import torch

        return self._empty(config, dtype or torch.float32).requires_grad_(False)

    def check_fit(self) -> None:
        """Raise ValueError unless every tensor of the model is in the files, in its shape, by their headers."""
        import torch

        from mm_parallel.weights import check_names, check_shape, same_kind

        wanted = self._empty(self.config, torch.float32).state_dict()
        try:
            check_names(set(wanted), set(self.checkpoint))
            for name, target in wanted.items():
                given = self.checkpoint.meta(name)
                check_shape(name, given, target)
                same_kind(name, given, target)
        except ValueError as error:
            raise ValueError(f"{self.checkpoint.path}: {error}") from error

    def _check_adapters(self) -> None:
        """ValueError unless all adapters fit, on the meta device: only a comparison."""
        import torch

        from mm_models.lora import Weighted, load_adapters

        for lora, adapter in self.adapters:
            for note in adapter.notes:
                print(one_line(f"{lora.path}: {note}"), file=sys.stderr)
            check_family(lora.path, adapter, self.family)
            for note in self._compare_base(lora.path, adapter):
                print(one_line(f"{lora.path}: {note}"), file=sys.stderr)
            shapes, whole = ({name: those.meta(name) for name in those} for those in (adapter, adapter.differences))
            try:
                load_adapters(self._empty(self.config, torch.float32), [Weighted(shapes, adapter.alphas, whole)])
            except ValueError as error:
                raise ValueError(f"lora {lora.path}: {error}") from error

    def _compare_base(self, path: Path, adapter: Adapter) -> list[str]:
        """What a person should know where an adapter was trained on other weights. ValueError where that cannot be."""
        if not adapter.trained_on:
            return []
        facts = {"family": self.family.name, "prediction": self.family.video.prediction(self.config)}
        facts |= {"expert": self.expert} if self.expert else {}
        facts |= describe_content(self.checkpoint.tensors, adapter.modules)
        return check_base(adapter.trained_on, facts, f"lora {path}")

    def _adapt(self, model: nn.Module) -> None:
        if self.adapters:
            from mm_models.lora import Weighted, load_adapters

            load_adapters(model, [Weighted(a, a.alphas, a.differences, lora.strength) for lora, a in self.adapters])

    def _empty(self, config: Any, dtype: torch.dtype) -> nn.Module:
        import torch

        from mm_models.layers import cast_weights

        with torch.device("meta"):
            return cast_weights(self.family.build(config), dtype)


def open_transformers(
    path: Path, model: str | None, loras: Sequence[Lora], boundary: float | None
) -> tuple[tuple[Transformer, ...], float | None]:
    """The one or two that lie there, and the boundary that is asked for or said in the files. ValueError as `Weights`.

    loras: adapters that are put on each of them, or on one, and compared with it.
    """
    for lora in loras:
        must_exist(lora.path, "lora")
    pair = open_experts(path)
    if pair is None:
        if of_one := [lora for lora in loras if lora.expert]:
            raise ValueError(
                f"lora {of_one[0].expert}={of_one[0].path} is for one of two experts, but {path} holds one model: give "
                "the path alone"
            )
        if two := [lora.path for lora in loras if open_experts(lora.path)]:
            raise ValueError(f"lora {two[0]} is for two experts, but {path} holds one model: name one of its folders")
        if boundary is not None:
            raise ValueError(f"boundary {boundary} is for two experts, but {path} holds one model: leave it out")
        return (Transformer(path, model, loras, expert_of(path) or ""),), None
    check_value("boundary", boundary, Boundary)
    high, low = (
        Transformer(folder, model, [lora for lora in loras if lora.on(expert)], expert)
        for folder, expert in zip((pair.high, pair.low), EXPERTS, strict=True)
    )
    if high.config != low.config:
        raise ValueError(f"{path}: the two experts differ: {high.config}, {low.config}")
    return (high, low), boundary or pair.boundary


def find_known(family: Family, weights: Path, loras: Sequence[Lora], two: bool) -> Distilled | None:
    """What the weights or their adapters are known for by name. Where only one of two experts is known, that is said,
    and nothing is taken from it.
    """
    rows = family.video.distilled
    found = [
        find_distilled(rows, [*(lora.path for lora in loras if lora.on(expert)), weights])
        for expert in (EXPERTS if two else ("",))
    ]
    known = [one for one in found if one is not None]
    if len(known) == len(found) and all(one.settings == known[0].settings for one in known):
        return known[0]
    if known:
        print(
            f"note: one of the two experts is known as {known[0].name}, and the other is not so: steps, guidance, "
            "flow_shift and sampler stay those of the model unless you give them",
            file=sys.stderr,
        )
    return None


def check_family(path: Path, adapter: Adapter, family: Family) -> None:
    """Raise ValueError unless the adapter's tensors are called as those of this family."""
    if adapter.family.name not in family.checkpoints:
        raise ValueError(
            f"lora {path} is for {adapter.family.name}, and these weights are {family.name}: give an adapter for "
            f"{family.name}, or the weights that it was trained on"
        )


def read_architecture(path: Path, family: Family, checkpoint: Checkpoint, model: str | None) -> Any:
    """The architecture that the files say, or that of the preset if they do not contradict it."""
    check_fields(family.config, {n: v for n, v in checkpoint.said.items() if v is not None}, f"{checkpoint.said_in}: ")
    known = {field.name for field in fields(family.config)}
    read = {name: value for name, value in checkpoint.config.items() if name in known}
    read = check_fields(family.config, read, f"{path}: ")
    unsaid = [name for name in family.unseen if name not in read]
    if model is None:
        if "num_heads" in known - read.keys():
            raise ValueError(f"{path}: the tensors do not say the number of heads: name the preset (model)")
        if unsaid:
            raise ValueError(
                f"{path}: no config.json says {' and '.join(unsaid)}, by which weights of {family.name} differ and "
                f"their tensors do not: name the preset (model): {', '.join(family.presets)}"
            )
        return family.config(**read)
    named, preset = find(model)
    if named is not family:
        raise ValueError(
            f"{path} is no {model}, but holds weights of {family.name}; without model, it is taken as it is"
        )
    config = preset.config
    other = [f"{k} {v} instead of {getattr(config, k)}" for k, v in read.items() if v != getattr(config, k)]
    if other:
        way = f"write {' and '.join(unsaid)} into its config.json" if unsaid else "it is taken as it is"
        raise ValueError(f"{path} is no {model}: it has {', '.join(other)}; without model, {way}")
    return config


def find_encoders(weights: Path, encoders: Path | None, family: Family, config: Any) -> Path:
    """The diffusers directory for such a model. ValueError that says what is missing where, or is wrong there."""
    repository, wanted = weights if encoders is None else encoders, family.video.encoders(config)
    missing = [f"{name}/" for name in wanted if not (repository / name).is_dir()]
    if not missing:
        check_parts(repository, wanted, family.video.own_folders, family.video.kinds)
        return repository
    if encoders is None and len(missing) == len(wanted):
        raise ValueError(f"{weights} is a transformer alone: name the diffusers directory of the encoders as well")
    raise ValueError(f"{repository} has no {', '.join(missing)}: the encoders are folders of a diffusers directory")


def must_exist(path: Path, what: str) -> Path:
    """The path itself, or a ValueError with its nearest neighbour."""
    if path.exists():
        return path
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, neighbours, n=1)
    raise ValueError(f"{what}: {path} does not exist" + (f", did you mean {path.parent / near[0]}?" if near else ""))

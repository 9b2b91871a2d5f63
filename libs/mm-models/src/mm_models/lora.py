"""Low-rank adapters (LoRA) on any of our models, by peft (`pip install mm-models[lora]`): tensors in, tensors out.

Files of adapters, whatever their format, are read and written by mm_convert: `open_lora`, `save_lora`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mm_models.families import family_of, suggest
from mm_models.layers import Linear, wide
from mm_models.parts import find_linears

Part = tuple[slice, ...]
"""Of a tensor: rows, columns and so on; empty for all."""


@dataclass(frozen=True)
class LoRAConfig:
    """W becomes W + alpha/rank · B A."""

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    """On the input of A, while training."""
    targets: tuple[str, ...] | None = None
    """Linears by our names, whole or their end: "q" is the q of every attention in every block of a Wan. Where the
    family has parts, "vision:qkv" is that end in one of them, and "vision" all linears there. None: those that are
    usual for the model's family (`Family.lora_targets`).
    """

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank is {self.rank}, but must be at least 1; 16 to 128 are usual")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout is {self.dropout}, but must be at least 0 and less than 1")


def add_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Wraps the targets of `model` in place; only the adapters can be trained from then on. Returns the model.

    B is zero at first, so the model computes what it did before. Adapters are at least float32, whatever the base is,
    and lie on its device (so they may be on meta: see `mm_models.initial.initial_adapter`).

    Raises:
        ValueError: a target that names no linear of this model, or a model that has adapters already.
    """
    targets = family_of(model.config).lora_targets if config.targets is None else config.targets
    return _inject(model, targets, r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout)


@dataclass(frozen=True)
class Weighted:
    """An adapter, and how strongly it acts: W becomes W + strength · (alpha/rank · B A), and a parameter with a whole
    difference that parameter + strength · difference.
    """

    tensors: Mapping[str, Tensor]
    """`blocks.0.self_attn.q.lora_A.weight` (rank x in), `….lora_B.weight` (out x rank), and so on; of a convolution
    with its kernel behind that, and ones.
    """
    alphas: Mapping[str, float]
    """Linear or convolution -> its alpha."""
    differences: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter -> what is added to it whole."""
    strength: float = 1.0

    @property
    def parameters(self) -> list[str]:
        """What it changes, by name."""
        return [*dict.fromkeys((*(f"{name}.weight" for name in self.alphas), *self.differences))]

    def shapes(self, parameter: str) -> list[tuple[int, ...]]:
        """Of the parameter, as its factors and its whole difference say."""
        said = [tuple(self.differences[parameter].shape)] if parameter in self.differences else []
        if (module := parameter.removesuffix(".weight")) in self.alphas:
            a, b = (self.tensors[f"{module}.lora_{letter}.weight"].shape for letter in "AB")
            said.append((b[0], *a[1:]))
        return said

    def added(self, parameter: str, part: Part = (), device: torch.device | str | None = None) -> Tensor:
        """What this adds to a parameter, or to a part of it, by slices: at least float32, on the device."""
        both = (self.low_rank(parameter, part, device), self.whole(parameter, part, device))
        return sum(one for one in both if one is not None)

    def low_rank(self, parameter: str, part: Part = (), device: torch.device | str | None = None) -> Tensor | None:
        """Of that, what the factors make; None without factors."""
        if (factors := self.factors(parameter, part[:1], device)) is None:
            return None
        a, b = factors
        added = b @ a.flatten(1)
        return added.view(len(b), *a.shape[1:])[(slice(None), *part[1:])]

    def factors(
        self, parameter: str, rows: Part = (), device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """A, and of B these rows, times the scale; at least float32. None without factors."""
        module = parameter.removesuffix(".weight")
        if module == parameter or module not in self.alphas:
            return None
        a, b = (self.tensors[f"{module}.lora_{letter}.weight"] for letter in "AB")
        a, b = (wide(factor.to(device)) for factor in (a[...], b[rows or ...]))
        return a, self.strength * self.alphas[module] / len(a) * b.flatten(1)

    def whole(self, parameter: str, part: Part = (), device: torch.device | str | None = None) -> Tensor | None:
        """Of that, the whole difference; None without one."""
        if parameter not in self.differences:
            return None
        return self.strength * wide(self.differences[parameter][part or ...].to(device))


def load_lora(model: nn.Module, tensors: Mapping[str, Tensor], alphas: Mapping[str, float]) -> nn.Module:
    """`load_adapters` of one adapter, whose arguments `Weighted` explains."""
    return load_adapters(model, [Weighted(tensors, alphas)])


def load_adapters(model: nn.Module, adapters: Sequence[Weighted]) -> nn.Module:
    """Adds trained adapters to `model` in place, each module with its own rank and alpha. Returns the model.

    The factors of several are put side by side, as one adapter of the sum of their ranks. A convolution gets its
    factors added to its weight, as patches are embedded by one that peft cannot wrap; so does what has a whole
    difference.

    Raises:
        ValueError: a tensor that fits nowhere in the model, or is missing; a model that has adapters already.
    """
    modules, shapes = dict(model.named_modules()), {name: p.shape for name, p in model.named_parameters()}
    convolutions = {name for one in adapters for name in one.alphas if isinstance(modules.get(name), nn.Conv3d)}
    linears: dict[str, list[Weighted]] = {}
    for one in adapters:
        check_fit(one, shapes)
        for name in one.alphas.keys() - convolutions:
            linears.setdefault(name, []).append(one)
    if linears:
        linears = {name: linears[name] for name in sorted(linears)}
        ranks = {name: sum(one.tensors[f"{name}.lora_A.weight"].shape[0] for one in of) for name, of in linears.items()}
        # Of one adapter, B stays as it is and alpha has the strength; of several, B has both, and alpha is the rank.
        alphas = {
            name: of[0].strength * of[0].alphas[name] if len(of) == 1 else float(ranks[name])
            for name, of in linears.items()
        }
        first = next(iter(linears))
        # peft's patterns are regular expressions for the end of a name; ^ makes it the whole.
        own = {"rank_pattern": {f"^{n}": rank for n, rank in ranks.items()}}
        own |= {"alpha_pattern": {f"^{n}": alpha for n, alpha in alphas.items()}}
        _inject(model, [*linears], r=ranks[first], lora_alpha=alphas[first], **own)
    slots = lora_state_dict(model)
    for name, of in linears.items():
        at = 0
        for one in of:
            a, b = (one.tensors[f"{name}.lora_{letter}.weight"] for letter in "AB")
            scale = 1.0 if len(of) == 1 else one.strength * one.alphas[name] / len(a)
            slots[f"{name}.lora_A.weight"][at : at + len(a)].copy_(a)
            slots[f"{name}.lora_B.weight"][:, at : at + len(a)].copy_(b if scale == 1.0 else wide(b) * scale)
            at += len(a)
    parameters = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
    for one in adapters:
        for name in one.parameters:
            by_weight = name.removesuffix(".weight") in convolutions
            if not by_weight and name not in one.differences:
                continue  # factors alone, which stand beside it
            if name not in parameters:
                raise ValueError(
                    f"the adapter has a whole difference of {name}, and this model holds no such parameter: its "
                    "matrices are in fewer bits, or on the host (base, host_layers). Leave these out, or merge the "
                    "adapter into the weights first (mm-convert)"
                )
            target = parameters[name]
            added = (one.added if by_weight else one.whole)(name, device=target.device)
            target.data = (wide(target.data) + added).to(target.dtype)
    return model


def check_fit(adapter: Weighted, shapes: Mapping[str, Sequence[int]], all_there: bool = False) -> None:
    """Raise ValueError unless the tensors of an adapter are whole and fit parameters of these shapes.

    all_there: whether linears that are not there are refused here, too; `load_adapters` has what wraps them say it.
    """
    wanted = {f"{name}.lora_{letter}.weight" for name in adapter.alphas for letter in "AB"}
    wrong = sorted(wanted ^ adapter.tensors.keys())
    wrong += [name for name in (adapter.parameters if all_there else adapter.differences) if name not in shapes]
    known = [name for name in adapter.parameters if name in shapes] if not wrong else []
    wrong += [name for name in known if any(shape != tuple(shapes[name]) for shape in adapter.shapes(name))]
    if wrong:
        there = f" ({[*adapter.shapes(wrong[0])[0]]}, here {[*shapes[wrong[0]]]})" if wrong[0] in known else ""
        raise ValueError(f"{len(wrong)} tensors of the adapter are missing, unknown or misshapen: {wrong[0]}{there}, …")


def merge_lora(model: nn.Module) -> nn.Module:
    """Adds the adapters to the weights they stand beside and takes them out, in place: a plain, faster model."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors: `blocks.0.self_attn.q.lora_A.weight` and so on."""
    return {n.replace(".default.", "."): tensor for n, tensor in model.state_dict().items() if ".lora_" in n}


def _adapted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def _inject(model: nn.Module, targets: Sequence[str], **settings) -> nn.Module:
    """Wraps the targets, whole names or their ends, with the settings of peft."""
    from peft import LoraConfig, inject_adapter_in_model

    if _adapted(model):
        raise ValueError("this model has LoRA adapters already: merge them first (merge_lora), or start from the base")
    family = family_of(model.config)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears = [name for name in linears if name not in family.unadapted]
    found = {target: find_linears(model, target, linears) for target in targets}
    for target in (target for target, those in found.items() if not those):
        if target in family.unadapted:
            raise ValueError(
                f"LoRA target {target!r}: the model multiplies by its weight itself, so an adapter beside it would do "
                "nothing. Leave it out, or train the weights"
            )
        ends = sorted({re.split(r"\.\d+\.", name)[-1] for name in linears})
        parts = [f"{part}:…" for part in family.parts]
        part, colon, end = target.rpartition(":")
        near = suggest(part, [*family.parts]) if colon and part not in family.parts else suggest(end, ends)
        raise ValueError(
            f"LoRA target {target!r} names no linear of this model{near}; there are {', '.join(ends + parts)}"
        )

    model.requires_grad_(False)
    on_meta = next(model.parameters()).is_meta
    wrapped = [*dict.fromkeys(name for those in found.values() for name in those)]
    config = LoraConfig(target_modules=wrapped, bias="none", **settings)
    inject_adapter_in_model(config, model, low_cpu_mem_usage=on_meta)
    for layer in _adapted(model):
        layer.cast_input_dtype_enabled = False
        for linear in (layer.lora_A["default"], layer.lora_B["default"]):
            linear.__class__ = Linear  # peft makes plain ones; these run in the dtype of their input like all others
            linear.weight.data = wide(linear.weight.data)
    return model

"""Low-rank adapters (LoRA) on any of our models, by peft (`pip install mm-models[lora]`): tensors in, tensors out.

Files of adapters, whatever their format, are read and written by mm_convert: `open_lora`, `save_lora`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_models.families import family_of, suggest
from mm_models.layers import Linear, wide
from mm_models.parts import find_linears


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


def load_lora(model: nn.Module, tensors: Mapping[str, Tensor], alphas: Mapping[str, float]) -> nn.Module:
    """Adds trained adapters to `model` in place, each with its own rank and alpha. Returns the model.

    A convolution gets its adapter added to its weight, as patches are embedded by one that peft cannot wrap.

    Args:
        tensors: `blocks.0.self_attn.q.lora_A.weight` (rank x in), `….lora_B.weight` (out x rank), and so on; of a
            convolution with its kernel behind that, and ones.
        alphas: linear or convolution -> its alpha.

    Raises:
        ValueError: a tensor that fits nowhere in the model, or is missing; a model that has adapters already.
    """
    modules = dict(model.named_modules())
    ranks = {name: tensors[f"{name}.lora_A.weight"].shape[0] for name in alphas}
    convolutions = [name for name in alphas if isinstance(modules.get(name), nn.Conv3d)]
    linears = [name for name in alphas if name not in convolutions]
    if linears:
        common = {"r": ranks[linears[0]], "lora_alpha": alphas[linears[0]]}
        # peft's patterns are regular expressions for the end of a name; ^ makes it the whole.
        own = {"rank_pattern": {f"^{n}": ranks[n] for n in linears}}
        own |= {"alpha_pattern": {f"^{n}": alphas[n] for n in linears}}
        _inject(model, linears, **common, **own)
    slots = lora_state_dict(model)
    shapes = {name: slot.shape for name, slot in slots.items()}
    for name in convolutions:
        out, *kernel = modules[name].weight.shape
        shapes[f"{name}.lora_A.weight"] = torch.Size((ranks[name], *kernel))
        shapes[f"{name}.lora_B.weight"] = torch.Size((out, ranks[name], 1, 1, 1))
    wrong = [n for n in shapes.keys() ^ tensors.keys()] or [n for n in shapes if shapes[n] != tensors[n].shape]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors of the adapter are missing, unknown or misshapen: {sorted(wrong)[0]}, …"
        )
    for name, slot in slots.items():
        slot.copy_(tensors[name])
    for name in convolutions:
        weight = modules[name].weight
        a, b = (wide(tensors[f"{name}.lora_{letter}.weight"].to(weight.device)).flatten(1) for letter in "AB")
        weight.data = (wide(weight.data) + (alphas[name] / ranks[name] * b @ a).view_as(weight)).to(weight.dtype)
    return model


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

"""Low-rank adapters (LoRA) on any of our models, by peft (`pip install mm-models[lora]`).

Files are directories that peft can read too: `adapter_model.safetensors`, with rank and alpha in its header, and
`adapter_config.json`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from mm_models.layers import Linear, wide

PEFT_PREFIX = "base_model.model."  # what peft writes before the name of every parameter


@dataclass(frozen=True)
class LoRAConfig:
    """W becomes W + alpha/rank · B A."""

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    """On the input of A, while training."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")
    """Linears by our names, whole or their end: "q" is the q of every attention in every block."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank is {self.rank}, but must be at least 1; 16 to 128 are usual")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout is {self.dropout}, but must be at least 0 and less than 1")


def add_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Wraps the targets of `model` in place; only the adapters can be trained from then on. Returns the model.

    B is zero at first, so the model computes what it did before. Adapters are at least float32, whatever the base is,
    and lie on its device (so they may be on meta: see `mm_models.initial`).

    Raises:
        ValueError: a target that names no linear of this model, or a model that has adapters already.
    """
    from peft import inject_adapter_in_model

    if _adapted(model):
        raise ValueError("this model has LoRA adapters already: merge them first (merge_lora), or start from the base")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            ends = sorted({".".join(part for part in name.split(".")[2:]) or name for name in linears})
            raise ValueError(f"LoRA target {target!r} names no linear of this model; there are {', '.join(ends)}")

    model.requires_grad_(False)
    on_meta = next(model.parameters()).is_meta
    inject_adapter_in_model(_peft_config(config), model, low_cpu_mem_usage=on_meta)
    for layer in _adapted(model):
        layer.cast_input_dtype_enabled = False
        for linear in (layer.lora_A["default"], layer.lora_B["default"]):
            linear.__class__ = Linear  # peft makes plain ones; these run in the dtype of their input like all others
            linear.weight.data = wide(linear.weight.data)
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
    return {_plain(name): tensor for name, tensor in model.state_dict().items() if ".lora_" in name}


def save_lora(model: nn.Module, path: Path | str, *, base: str = "", overwrite: bool = False) -> Path:
    """Writes the adapters of `model` to the directory `path`; `base` and `overwrite` as for `write_lora`."""
    layers = _adapted(model)
    if not layers:
        raise ValueError("this model has no LoRA adapters: add_lora first")
    targets = sorted({name.rsplit(".lora_", 1)[0] for name in lora_state_dict(model)})
    dropout = getattr(layers[0].lora_dropout["default"], "p", 0.0)
    config = LoRAConfig(layers[0].r["default"], layers[0].lora_alpha["default"], dropout, tuple(targets))
    return write_lora(path, lora_state_dict(model), config, base=base, overwrite=overwrite)


def write_lora(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    config: LoRAConfig,
    *,
    base: str = "",
    overwrite: bool = False,
) -> Path:
    """Writes adapters to the directory `path`, from tensors under the names that they have in `model.state_dict()`.

    Tensors that are not adapters are left out. The weights are replaced in one move, never half-written.

    Args:
        base: the model that the adapters are for, as a name or a path; recorded for people and for peft.
        overwrite: replace adapters that are there.

    Raises:
        ValueError: adapters are there already and `overwrite` is not given, or no tensor is one.
    """
    from safetensors.torch import save_file

    path = Path(path)
    there = [file for file in (path / "adapter_model.safetensors", path / "adapter_config.json") if file.exists()]
    if path.is_file():
        raise ValueError(f"{path} is a file; name a directory for the adapters")
    if there and not overwrite:
        raise ValueError(f"{there[0]} exists; name another directory, or give overwrite to replace it")
    adapters = {PEFT_PREFIX + _plain(n): tensors[n].detach().cpu().contiguous() for n in tensors if ".lora_" in n}
    if not adapters:
        raise ValueError(f"nothing to write to {path}: none of {len(tensors)} tensors is a LoRA adapter")
    path.mkdir(parents=True, exist_ok=True)
    described = _peft_config(config)
    described.base_model_name_or_path = base or None
    described.save_pretrained(path)
    unfinished = path / "adapter_model.safetensors.part"
    header = {"format": "pt", "rank": str(config.rank), "alpha": str(config.alpha)} | ({"base": base} if base else {})
    save_file(adapters, unfinished, header)
    os.replace(unfinished, path / "adapter_model.safetensors")
    return path


def load_lora(model: nn.Module, path: Path | str) -> LoRAConfig:
    """Adds the adapters in `path`, a directory of `save_lora` or its safetensors file, to `model` in place.

    Raises:
        ValueError: no such file, or a damaged one; a tensor that fits nowhere in the model or is missing; rank and
            alpha that cannot be found, or that the header and adapter_config.json tell differently.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} holds no LoRA adapters: expected {file}")
    try:
        with safe_open(file, "pt") as stream:
            described = stream.metadata() or {}
            tensors = {_plain(name): stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, cut off or no safetensors file: {error}") from error
    rank, alpha = _scale(file, described)
    targets = tuple(sorted({name.rsplit(".lora_", 1)[0] for name in tensors}))
    config = LoRAConfig(rank, alpha, 0.0, targets)
    add_lora(model, config)
    slots = lora_state_dict(model)
    wrong = [n for n in slots.keys() ^ tensors.keys()] or [n for n in slots if slots[n].shape != tensors[n].shape]
    if wrong:
        raise ValueError(f"{file}: {len(wrong)} tensors are missing, unknown or misshapen, first {sorted(wrong)[0]}")
    for name, slot in slots.items():
        slot.copy_(tensors[name])
    return config


def _adapted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def _plain(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX).replace(".default.", ".")


def _peft_config(config: LoRAConfig):
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        bias="none",
    )


def _scale(file: Path, described: Mapping[str, str]) -> tuple[int, float]:
    """Rank and alpha, from the header of the file or the adapter_config.json beside it."""
    beside = file.parent / "adapter_config.json"
    if "rank" in described and "alpha" in described:
        said = int(described["rank"]), float(described["alpha"])
        # Of a file under another name, the config beside it may be somebody else's.
        if file.name == "adapter_model.safetensors" and beside.is_file() and _config_scale(beside) != said:
            r, alpha = _config_scale(beside)
            raise ValueError(
                f"{file} says rank {said[0]} and alpha {said[1]:g}, but {beside} says r {r} and lora_alpha {alpha:g}: "
                "the two do not belong together, or one was edited"
            )
        return said
    if not beside.is_file():
        raise ValueError(f"{file} does not say its alpha, and there is no {beside}: the strength would be a guess")
    return _config_scale(beside)


def _config_scale(beside: Path) -> tuple[int, float]:
    """r and lora_alpha of an adapter_config.json."""
    try:
        config = json.loads(beside.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{beside} is not JSON: {error}") from error
    special = [key for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if special:
        raise ValueError(f"{beside} uses {', '.join(special)}, which is not supported: only plain LoRA is")
    return int(config["r"]), float(config["lora_alpha"])

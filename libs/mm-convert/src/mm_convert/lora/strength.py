"""The alpha of every module of an adapter, from all places that may say it; they must agree with the tensors."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from math import isclose, isfinite, sqrt
from typing import Any

from mm_convert.files import parse_json
from mm_convert.lora.names import Names
from mm_convert.tensors.views import LazyTensor

Said = dict[str, tuple[float | None, float | None]]  # module as found -> rank and alpha, where they are said

# Settings of peft under which factors mean something else, and the values under which they do not.
_SPECIAL = {
    **dict.fromkeys(("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "layer_replication"), (None, False)),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "target_parameters"), (None, [])),
    "alora_invocation_tokens": (None,),
    "bias": (None, "none"),
    "peft_type": (None, "LORA"),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),  # others change the base
}
_UNPACK = {"F16": "<e", "F32": "<f", "F64": "<d", "I32": "<i", "I64": "<q"}
_ALPHA_IS_RANK = ("diffusers", "comfyui", "kohya", "diffsynth")  # what their loaders take it for where nothing is said


def find_alphas(
    names: Names,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    adapter_config: Mapping[str, Any] | None,
    where: str,
    rank: float | None,
    alpha: float | None,
) -> tuple[dict[str, float], list[str]]:
    """Module as found -> alpha, and notes; the arguments are those of `read_lora`.

    Raises ValueError when alpha is unknown, and when two places contradict each other.
    """
    ranks = {module: tensors[parts["A"]].shape[0] for module, parts in names.parts.items()}
    places: dict[str, Said] = {}
    own = {module: parts["alpha"] for module, parts in names.parts.items() if "alpha" in parts}
    places[f"the alpha tensors of {where}"] = {
        module: (None, _value(tensors[own[module]], own[module])) for module in own
    }
    if adapter_config is not None:
        place = f"the adapter_config.json of {where}"
        places[place] = _of_config(adapter_config, ranks, place)
    place = f"the header of {where}"
    places[place] = dict.fromkeys(ranks, _numbers(metadata.get("rank"), metadata.get("alpha"), place))
    if "lora_adapter_metadata" in metadata:
        place += ", lora_adapter_metadata,"
        places[place] = _of_config(_of_prefix(metadata["lora_adapter_metadata"], names.prefix, place), ranks, place)
    places["the caller"] = dict.fromkeys(ranks, _numbers(rank, alpha, "the caller"))

    alphas = _agree(places, ranks, where)
    unsaid = {module: float(ranks[module]) for module in ranks if module not in alphas}
    if not unsaid:
        return alphas, []
    if names.twofold or names.format not in _ALPHA_IS_RANK:
        raise ValueError(
            f"{where} does not say its alpha ({_why(names)}), and without it the strength would be a guess: give the "
            f"training's own (--lora_alpha); the rank is {', '.join(f'{r:g}' for r in sorted({*unsaid.values()}))}"
        )
    note = f"alpha of {len(unsaid)} modules is said nowhere and taken to be the rank, as {names.format} loaders do"
    return alphas | unsaid, [note]


def _agree(places: Mapping[str, Said], ranks: Mapping[str, int], where: str) -> dict[str, float]:
    """Module as found -> the alpha that all places say which say any; first come, first believed."""
    believed: dict[str, tuple[float, str]] = {}
    for place, said in places.items():
        for module, (rank, alpha) in said.items():
            if rank is not None and rank != ranks[module]:
                raise ValueError(
                    f"{place} says rank {rank:g}, but the factors of {module} in {where} have {ranks[module]}"
                )
            if alpha is None:
                continue
            first, origin = believed.setdefault(module, (alpha, place))
            if not isclose(alpha, first, rel_tol=2**-7):  # an alpha tensor may be a rounded bfloat16
                raise ValueError(
                    f"{place} says alpha {alpha:g} for {module}, but {origin} says {first:g}: "
                    "they do not belong together, or one was edited"
                )
    return {module: alpha for module, (alpha, _) in believed.items()}


def _why(names: Names) -> str:
    if names.twofold:
        return "its names are MindSpeed-MM's as well as others', who mean the rank"
    if names.format == "peft":
        return "there is no adapter_config.json"
    return f"{names.format} files hold neither rank nor alpha"


def _of_prefix(text: str, prefix: str, place: str) -> dict[str, Any]:
    """The settings of diffusers' JSON for one model; diffusers writes the prefix of its tensors before their names."""
    try:
        config = {**parse_json(text)}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place} is not a JSON object: {error}") from error
    return {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)} or config


def _of_config(config: Mapping[str, Any], ranks: Mapping[str, int], place: str) -> Said:
    """Rank and alpha by peft's rules: a pattern is a regular expression for the end of a name, and the first wins."""
    special = [f"{key} {config[key]!r}" for key, plain in _SPECIAL.items() if config.get(key) not in plain]
    if special:
        raise ValueError(f"{place} uses {', '.join(special)}: this is not plain LoRA, which alone can be converted")
    said = {}
    for module in ranks:
        rank, alpha = _numbers(
            _matching(config.get("rank_pattern"), module, config.get("r"), place),
            _matching(config.get("alpha_pattern"), module, config.get("lora_alpha"), place),
            place,
        )
        if config.get("use_rslora") and alpha is not None:
            alpha *= sqrt(ranks[module])  # alpha/sqrt(rank) is this alpha/rank
        said[module] = rank, alpha
    return said


def _matching(patterns: Any, module: str, default: Any, place: str) -> Any:
    try:
        found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(found, default)
    except (re.error, AttributeError) as error:
        raise ValueError(f"{place} has a pattern that cannot be read: {error}") from error


def _numbers(rank: Any, alpha: Any, place: str) -> tuple[float | None, float | None]:
    return (
        None if rank is None else _number("rank", rank, place),
        None if alpha is None else _number("alpha", alpha, place),
    )


def _number(what: str, said: Any, place: str) -> float:
    try:
        number = float(said)
    except (TypeError, ValueError):
        number = 0.0
    if not isfinite(number) or not number:
        raise ValueError(f"{place} says {what} {said!r}; it must be a number other than 0")
    return number


def _value(tensor: LazyTensor, what: str) -> float:
    data = bytes(tensor.read()) if tensor.nbytes <= 8 else b""
    if tensor.dtype == "BF16" and len(data) == 2:
        data = bytes(2) + data  # the upper half of a float32
    form = _UNPACK.get("F32" if tensor.dtype == "BF16" else tensor.dtype)
    if form is None or len(data) != struct.calcsize(form):
        raise ValueError(f"alpha of {what} is {tensor.dtype} {list(tensor.shape)}; it must be one number")
    return _number("alpha", struct.unpack(form, data)[0], what)

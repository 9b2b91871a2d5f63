"""ComfyUI's quantised weights: which tensors are codes, which are their scales, and the weights that they stand for.

Old files have `X.scale_weight` beside `X.weight` and one tensor `scaled_fp8`. New ones have `X.weight_scale`, and say
the format in a tensor of JSON, `X.comfy_quant`, or in the header, under `_quantization_metadata`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from mm_convert.files import brief, parse_json
from mm_convert.tensors.views import LazyTensor

METADATA = "_quantization_metadata"  # of the header: {"layers": {"blocks.0.ffn.0": {"format": …}}}
_MARKER = "scaled_fp8"
_DECLARED = ".comfy_quant"
_SCALE = (".weight_scale", ".scale_weight")  # new, old
_OF_INPUT = (".input_scale", ".scale_input")  # of activations, which only products in fp8 need
_FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_NAMES = {"float8_e4m3fn": "fp8 scaled (e4m3fn)", "float8_e5m2": "fp8 scaled (e5m2)", "int8_tensorwise": "int8 scaled"}
_WORDS = ("format", "params", "full_precision_matrix_mult", "group_size", "convrot", "convrot_groupsize", "orig_dtype")
_MAX_JSON = 65_536  # bytes of what a layer says of itself


@dataclass
class Dequantised:
    """The tensors with every quantised weight as a view of bfloat16, and without what stood beside it.

    kinds: how many weights were of which kind. notes: what a person should know of it.
    """

    tensors: dict[str, LazyTensor]
    kinds: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def dequantise(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], where: str) -> Dequantised:
    """Views in place of ComfyUI's quantised weights; no weight is read, only what the layers say of their formats.

    Raises ValueError for a format that is not known, and for scales that do not fit their weight.
    """
    left = dict(tensors)
    markers = [name for name in left if name == _MARKER or name.endswith(f".{_MARKER}")]
    declared = _read_declared(left, metadata, where)
    scaled = [name.removesuffix(end) for name in left for end in _SCALE if name.endswith(end)]
    layers = {layer: declared.get(layer) for layer in [*declared, *scaled]}
    result = Dequantised(left)
    empty = 0
    for layer, said in layers.items():
        weight, format_, rotation = _read_format(left, layer, said, where)
        scale = next((left.pop(layer + end) for end in _SCALE if layer + end in left), None)
        if scale is None:
            raise ValueError(f"{where}: {layer}.weight is {format_}, but its scale {layer}{_SCALE[0]} is missing")
        left[f"{layer}.weight"] = _view(left, layer, weight, format_, scale, rotation, where)
        empty += prod(scale.shape) == 0
        result.kinds[_NAMES.get(format_, format_) + (", convrot" if rotation else "")] += 1
    for name in [*markers, *(layer + _DECLARED for layer in declared)]:
        left.pop(name, None)
    inputs = [layer + end for layer in layers for end in _OF_INPUT if layer + end in left]
    for name in inputs:
        del left[name]
    if inputs:
        result.notes.append(
            f"{len(inputs)} scales of activations are left out, {inputs[0]}, …: only products in fp8 need them"
        )
    if empty:
        result.notes.append(f"{empty} scales have no elements: they are taken as 1")
    return result


def _read_declared(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """What layers say of themselves; where both do, the header is believed, as in ComfyUI."""
    declared: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.endswith(_DECLARED):
            if tensor.dtype not in ("U8", "I8") or tensor.nbytes > _MAX_JSON:
                raise ValueError(f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}, not a short text of JSON")
            declared[name.removesuffix(_DECLARED)] = _parse(bytes(tensor.read()), f"{where}: {name}")
    if METADATA in metadata:
        header = _parse(metadata[METADATA].encode(), f"{where}: {METADATA} of its header")
        if not isinstance(header.get("layers"), dict):
            raise ValueError(f"{where}: {METADATA} of its header has no table of layers: {brief(header)}")
        declared |= header["layers"]
    return declared


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        json_ = parse_json(raw)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(json_, dict):
        raise ValueError(f"{where} is {brief(json_)}, not a table")
    return json_


def _read_format(tensors: Mapping[str, LazyTensor], layer: str, said: Any, where: str) -> tuple[LazyTensor, str, int]:
    """The codes of a layer, their format, and the group size of a rotation (0: none)."""
    weight = tensors.get(f"{layer}.weight")
    if weight is None:
        raise ValueError(f"{where} has a scale or a format for {layer}, but no {layer}.weight")
    if said is None:  # nothing but a scale: it can only mean fp8
        if weight.dtype not in _FP8:
            raise ValueError(
                f"{where}: {layer}.weight is {weight.dtype} and has a scale, but nothing says in which format. "
                f"{_way_out()}"
            )
        return weight, _FP8[weight.dtype], 0
    said = {**said, **said["params"]} if isinstance(said, dict) and isinstance(said.get("params"), dict) else said
    if not isinstance(said, dict) or not isinstance(said.get("format"), str):
        raise ValueError(f"{where}: what {layer} says of its format is {brief(said)}, not a table with a format")
    format_ = said["format"]
    if format_ not in (*_NAMES, "mxfp8", "nvfp4"):
        known = ", ".join((*_NAMES, "mxfp8", "nvfp4"))
        raise ValueError(
            f"{where}: {layer} is quantised as {brief(format_)}, which is not read (these are: {known}). {_way_out()}"
        )
    if unknown := [word for word in said if word not in _WORDS]:
        raise ValueError(
            f"{where}: {layer} says {unknown[0]} of its format {format_}, which is not known. {_way_out()}"
        )
    rotated = said.get("convrot", False)
    group = said.get("convrot_groupsize", 256) if rotated else 0
    if rotated and (format_ != "int8_tensorwise" or type(group) is not int or not _fits(group, weight)):
        raise ValueError(
            f"{where}: {layer} is {format_}, rotated in groups of {brief(group)}, with a weight of shape "
            f"{list(weight.shape)}: groups are powers of 4 that divide its columns, and only of int8_tensorwise"
        )
    return weight, format_, group


def _fits(group: int, weight: LazyTensor) -> bool:
    power_of_4 = group >= 4 and group & (group - 1) == 0 and group.bit_length() % 2 == 1
    return power_of_4 and len(weight.shape) == 2 and weight.shape[1] % group == 0


def _view(
    tensors: dict[str, LazyTensor],
    layer: str,
    weight: LazyTensor,
    format_: str,
    scale: LazyTensor,
    rotation: int,
    where: str,
) -> LazyTensor:
    """The weight that codes and scales stand for. Takes a second scale out of the tensors."""
    # Here, as numpy is wanted for nothing else.
    from mm_convert.tensors.quantised import MX_BLOCK, NV_BLOCK, scale_mxfp8, scale_nvfp4, scale_rows, tiled_shape

    codes = {"int8_tensorwise": "I8", "nvfp4": "U8", "mxfp8": "F8_E4M3"} | {name: kind for kind, name in _FP8.items()}
    scales = {"nvfp4": ("F8_E4M3", "U8"), "mxfp8": ("F8_E8M0", "U8")}.get(format_, ("F32", "F16", "BF16"))
    if weight.dtype != codes[format_] or scale.dtype not in scales or not weight.shape:
        raise ValueError(
            f"{where}: {layer}.weight is {weight.dtype} with a scale in {scale.dtype}; {format_} is {codes[format_]} "
            f"with {' or '.join(scales)}"
        )
    if format_ not in ("nvfp4", "mxfp8"):
        if scale.shape not in ((), (0,), (1,), (1, 1), weight.shape[:1], (weight.shape[0], 1)):
            raise ValueError(
                f"{where}: the scale of {layer} has shape {list(scale.shape)}; {format_} has one for the weight, "
                f"or one for each of its {weight.shape[0]} rows. {_way_out()}"
            )
        return scale_rows(weight, scale, rotation)
    block, packed = (NV_BLOCK, 2) if format_ == "nvfp4" else (MX_BLOCK, 1)
    columns = weight.shape[1] * packed if len(weight.shape) == 2 else 0
    tiled = tiled_shape(weight.shape[0], columns // block)
    if not columns or columns % block or scale.shape != tiled:
        raise ValueError(
            f"{where}: {layer}.weight has shape {list(weight.shape)} and scales {list(scale.shape)}; {format_} has "
            f"scales {list(tiled)} there, one for {block} neighbours in a row"
        )
    if format_ == "mxfp8":
        return scale_mxfp8(weight, scale)
    whole = tensors.pop(f"{layer}.weight_scale_2", None)
    if whole is None or whole.dtype != "F32" or prod(whole.shape) != 1:
        raise ValueError(f"{where}: {layer}.weight is nvfp4, but has no {layer}.weight_scale_2 that is one fp32 number")
    return scale_nvfp4(weight, scale, whole)


def _way_out() -> str:
    return "Take the file in bf16, fp16, fp8 or GGUF, or dequantise this one with the tool that made it"

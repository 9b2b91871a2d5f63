"""The folders of a diffusers directory: what may lie in them, found before a library opens them.

transformers and diffusers read whatever a folder names: other files, code, pickles, kernels from the network. Folders
get handed around, so here all of that is refused first, in one line. This file imports no torch.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

PARTS = ("text_encoder", "tokenizer", "vae")  # of every repository; image_encoder only of those with a CLIP branch

_MOST = {".index.json": 8 << 20, "tokenizer.json": 64 << 20, "vocab.json": 64 << 20, ".json": 1 << 20}  # bytes
_DEEPEST = 32  # published files have 4 levels
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = (".safetensors", *_PICKLES, ".gguf", ".h5", ".msgpack", ".onnx", ".flashpack")
_CODE = "names code of its own (auto_map), which is never run"
_KERNELS = "asks for other kernels, which would be downloaded"
_REFUSED = {  # keys of config.json and tokenizer_config.json, and why
    "auto_map": _CODE,
    "trust_remote_code": _CODE,
    "quantization_config": "is quantised, and only plain weights are read",
    "transformers_weights": "names another file of weights",
    "use_kernels": _KERNELS,
    "kernel_config": _KERNELS,
    "init_inputs": "names other files",
    "sp_model_kwargs": "names other files",
}
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_LET = "take the folder as the model's makers publish it"


def part_of(path: Path | str, name: str) -> Path:
    """The folder of one part of a diffusers directory. Raises ValueError if it is not there."""
    folder = Path(path) / name
    if not folder.is_dir():
        parts = [f"{part}/" for part in (*PARTS, *({name} - set(PARTS)))]
        raise ValueError(
            f"{folder} is not a folder: {path} should be a diffusers directory with {', '.join(parts[:-1])} and "
            f"{parts[-1]}, as the model's makers publish it (on the hub its name often ends in -Diffusers)"
        )
    return folder


def check_parts(
    repository: Path, names: Iterable[str], own: Mapping[str, Callable[[Path], Any]], kinds: Mapping[str, str]
) -> None:
    """Raises ValueError for a folder of these that is incomplete, of another model, or asks for what is never done.

    own: of folders with files of a family's own kind, what checks them (`Family.own_folders`).
    kinds: what the others must be (`Family.kinds`).
    """
    for name in names:
        folder = part_of(repository, name)
        if name in own:
            own[name](folder)
        elif name.startswith("tokenizer"):
            check_tokenizer(folder)
        else:
            check_weights(folder, kinds.get(name))


def check_weights(folder: Path, kind: str | None = None) -> int:
    """How many numbers the safetensors files of a folder with a config.json hold, by their headers.

    kind: the `_class_name` of diffusers or `model_type` of transformers that config.json must say; None: any.
    Raises ValueError unless they are complete and the only weights, and for a configuration that asks for more.
    """
    check_files(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter (adapter_config.json) of another model: {_LET}")
    config = read_json(folder / "config.json")
    _refuse(folder / "config.json", config)
    if kind is not None:
        _check_kind(folder / "config.json", config, kind)
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    tensors = numbers = 0
    for file in _files_of_weights(folder, stem):
        for name, shape, dtype in _headers(file):
            if name.endswith("weight") and dtype.startswith(("I", "U", "BOOL")):
                raise ValueError(f"{file}: {name} is of {dtype}: it is quantised, and only plain weights are read")
            tensors, numbers = tensors + 1, numbers + prod(shape)
    for key, value in config.items():
        if key.startswith("num_") and isinstance(value, int | float) and value < 0:
            raise ValueError(f"{folder / 'config.json'}: {key} is {value}, and must not be negative: {_LET}")
        count = len(value) if isinstance(value, list) else value if key.endswith(("layers", "blocks")) else 0
        if isinstance(count, int) and count > tensors:
            raise ValueError(
                f"{folder / 'config.json'}: {key} speaks of {count:,}, but the weights are {tensors} tensors"
            )
    return numbers


def check_tokenizer(folder: Path) -> None:
    """Raises ValueError for a tokenizer's folder that is incomplete, or asks for code or files elsewhere."""
    check_files(folder)
    if not any(
        (folder / name).exists() for name in ("tokenizer.json", "spiece.model", "vocab.json", "tokenizer.model")
    ):
        raise ValueError(f"{folder} has neither tokenizer.json nor spiece.model: {_LET}")
    for name in (
        "tokenizer.json",
        "config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ):
        if not (folder / name).exists():
            continue
        said = read_json(folder / name)
        _refuse(folder / name, said)
        for key, value in said.items():
            # old versions of transformers wrote where a special_tokens_map_file lay, and none reads it
            if key.endswith(("_file", "_files")) and value and key != "special_tokens_map_file":
                raise ValueError(f"{folder / name}: {key} names other files ({value!r}): {_LET}")


def check_files(folder: Path) -> None:
    """Raises ValueError unless all entries are regular files, of sizes that such files have, and lie in the folder.

    Links may lead into the folder, or to the blobs of the hub's cache. The folder itself may be a link.
    """
    real_folder = folder.resolve()
    for path, folders, names in os.walk(folder):
        if wrong := next((name for name in folders if name.endswith((*_MOST, *_WEIGHTS, ".model"))), None):
            raise ValueError(f"{Path(path) / wrong} is a folder, not a file: {_LET}")
        for name in names:
            _check_file(Path(path) / name, real_folder)


def _check_file(file: Path, real_folder: Path) -> None:
    real = file.resolve()
    in_cache = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if file.is_symlink() and not (in_cache or real.is_relative_to(real_folder)):
        raise ValueError(
            f"{file} is a link to {real}, outside its folder: put the file itself there, or link the whole folder"
        )
    if not file.exists():
        raise ValueError(f"{file} is a link to {real}, which does not exist: download it again")
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file} is no regular file (a pipe, socket or device): nothing else is opened")
    most = _most(file)
    if most is not None and found.st_size > most:
        raise ValueError(f"{file} has {found.st_size:,} bytes; such a file has at most {most:,}: {_LET}")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a small JSON file. Raises ValueError for anything else: no regular file, too large, too deep."""
    try:
        # a pipe in its place is opened without waiting for a writer
        with open(file, "rb", opener=_open_regular) as stream:
            most = _most(file) or _MOST[".json"]
            text = stream.read(most + 1)
        if len(text) > most:
            raise ValueError(f"it has more than {most:,} bytes")
        said = json.loads(text)
        if not isinstance(said, dict):
            raise ValueError(f"it is a {type(said).__name__}")
        if _deeper(said, _DEEPEST):
            raise RecursionError
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist: {_LET}") from None
    except RecursionError:
        raise ValueError(f"{file} is nested more than {_DEEPEST} deep: {_LET}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from error
    return said


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is no regular file")
    return descriptor


def read_count(file: Path, key: str, default: int) -> int:
    """A positive integer of a config.json. Raises ValueError for any other value."""
    value = read_json(file).get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{file}: {key} is {value!r}, and must be a positive integer: {_LET}")
    return value


def _most(file: Path) -> int | None:
    """Bytes that such a file has at most; None where that is not known."""
    return next((size for end, size in _MOST.items() if file.name.endswith(end)), None)


def _deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def _refuse(file: Path, said: Mapping[str, Any]) -> None:
    """Raises ValueError for what a library would do, and must not."""
    for key, why in _REFUSED.items():
        if said.get(key):
            raise ValueError(f"{file} {why}: {_LET}" if why is _CODE else f"{file} {why} ({key}): {_LET}")
    for key in _ATTENTION:
        if said.get(key) not in (None, "eager", "sdpa"):
            raise ValueError(f"{file} {_KERNELS} ({key} is {said[key]!r}): {_LET}")


def _check_kind(file: Path, config: Mapping[str, Any], wanted: str) -> None:
    """Raises ValueError if a config.json is of another class."""
    key = "_class_name" if "_class_name" in config else "model_type"
    if config.get(key) == wanted:
        return
    if config.get("format") == "mm":
        raise ValueError(
            f"{file} is of mm-convert's own form ({config.get('family')}), and must be {wanted!r}: if it is this "
            "model, convert it with `mm-convert convert … --to transformers` (or diffusers)"
        )
    raise ValueError(f"{file}: {key} is {config.get(key)!r}, and must be {wanted!r}: take the folder of this model")


def _files_of_weights(folder: Path, stem: str) -> list[Path]:
    """The files that are loaded. Raises ValueError where one is missing, and where others could as well be meant."""
    lies = sorted(f.name for f in folder.iterdir() if not f.name.startswith("."))
    there = [name for name in lies if name.endswith((*_WEIGHTS, ".index.json"))]
    whole, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    meant = sorted({*_read_index(folder / index).values()}) if index in there else [whole]
    others = [name for name in there if name not in (*meant, index)]
    if whole not in there and index not in there:
        if any(name.endswith(_PICKLES) for name in others):
            raise ValueError(
                f"{folder} holds pickled weights ({', '.join(others)}), which can run code: take the folder with "
                f"{whole}, or let `mm-convert convert` write it"
            )
        has = f" (it has {', '.join(others)})" if others else ""
        raise ValueError(f"{folder} has neither {whole} nor {index}{has}: {_LET}")
    if others:
        names = ", ".join(others[:3]) + (f", and {len(others) - 3} more" if len(others) > 3 else "")
        raise ValueError(
            f"{folder} holds {index if index in there else whole}, and also {names}: move away what is not meant"
        )
    for name in meant:
        if name not in there:
            raise ValueError(f"{folder} has no {name}, which {index} names: download it again")
    if index in there:
        _check_index(folder / index)
    return [folder / name for name in meant]


def _read_index(file: Path) -> dict[str, str]:
    """Names of tensors -> names of files beside the index."""
    said = read_json(file)
    files = said.get("weight_map")
    if not isinstance(files, dict) or not files or not isinstance(said.get("metadata"), dict):
        raise ValueError(f"{file} is no index of safetensors (metadata and weight_map): download it again")
    for name, target in files.items():
        if not isinstance(target, str) or Path(target).name != target or not target.endswith(".safetensors"):
            raise ValueError(f"{file} sends {name} to {target!r}, which is no safetensors file beside it: {_LET}")
    return files


def _check_index(index: Path) -> None:
    """Raises ValueError unless the files hold exactly the tensors that the index says, each where it says."""
    said = _read_index(index)
    found = {(name, target) for target in set(said.values()) for name, _, _ in _headers(index.with_name(target))}
    if different := sorted(found ^ set(said.items())):
        name, target = different[0]
        where = "and the index does not say so" if different[0] in found else "which has no such tensor"
        holds = f"{target} holds {name}, " if different[0] in found else f"it sends {name} to {target}, "
        raise ValueError(f"{index} does not fit its files: {holds}{where} ({len(different)} such): download them again")


def _headers(file: Path) -> Iterator[tuple[str, list[int], str]]:
    """Name, shape and dtype of each tensor. Raises ValueError for a file that is cut short or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as stream:
            for name in stream.keys():  # noqa: SIM118 - not a dictionary
                tensor = stream.get_slice(name)
                yield name, tensor.get_shape(), str(tensor.get_dtype())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no complete safetensors file ({error}): download it again") from error

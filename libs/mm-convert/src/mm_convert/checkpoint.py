"""Opening a checkpoint, whatever its files and names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert.content import Content, understand
from mm_convert.families.family import Config
from mm_convert.store.safetensors import read_files, read_folder
from mm_convert.tensors import LazyTensor

if TYPE_CHECKING:
    import torch

FORMAT, VERSION = "mm", 1  # of our own config.json


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """A checkpoint on disk as a mapping of *our* names to tensors; only headers are read until a tensor is asked for.

    Attributes:
        path: the folder or file it was read from.
        layout: "mm" (ours) or "safetensors".
        dialect: the names on disk, "original" or "diffusers".
        family: "wan".
        config: the fields of the model's configuration, for example of `WanConfig`. `num_heads` is absent where
            neither config.json nor the shapes say it.
        notes: what a person should know: tensors that were dropped, a config.json that contradicts the tensors.
        tensors: our name -> where its bytes are, in the order of the files.
        metadata: the free text of the safetensors headers.
    """

    def __init__(
        self,
        path: Path,
        layout: str,
        content: Content,
        tensors: dict[str, LazyTensor],
        metadata: dict[str, str],
        config: Config,
        notes: list[str],
    ) -> None:
        self.path, self.layout, self.content, self.tensors = path, layout, content, tensors
        self.metadata, self.config, self.notes = metadata, config, notes
        self.dialect, self.family = content.dialect, content.family.name
        self._maps: Any = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        """As safetensors spells it: "F32", "BF16", …"""
        return self.tensors[name].dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, mapped from the file where it lies in one piece: it takes memory only where it is read."""
        from mm_convert.torch_tensors import Maps

        self._maps = self._maps or Maps()
        return self._maps.tensor(self.tensors[name])


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a diffusers repository or its transformer folder, a Wan-AI folder, our own folder, or one safetensors file.

    Raises ValueError when it is none of these, when a file is broken, or when a tensor is unknown, missing or
    misshapen.
    """
    folder = _find_folder(Path(path))
    found, metadata = read_files([Path(path)]) if Path(path).is_file() else read_folder(folder)
    content = understand({name: tensor.shape for name, tensor in found.items()}, str(path))
    tensors = {content.names[name]: tensor for name, tensor in found.items() if name in content.names}
    config_json = _read_config_json(folder / "config.json")
    layout = "mm" if config_json.get("format") == FORMAT else "safetensors"
    config, notes = _merge_config(content, config_json, folder / "config.json")
    for reason in sorted(set(content.ignored.values())):
        names = [name for name, why in content.ignored.items() if why == reason]
        notes.append(f"{len(names)} tensors are left out ({reason}): {names[0]}, …")
    return Checkpoint(Path(path), layout, content, tensors, metadata, config, notes)


def _find_folder(path: Path) -> Path:
    """The folder with the tensors and their config.json."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is not a safetensors file")
        return path.parent
    for experts in (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")):
        present = [path / name for name in experts if (path / name).is_dir()]
        if len(present) == 2:
            raise ValueError(f"{path} holds two models; name one of {present[0]} (high noise) and {present[1]} (low)")
        if present:
            return present[0]
    if (path / ".metadata").exists() or (path / "latest").exists():
        raise ValueError(f"{path} is a training checkpoint (torch DCP); mm_train exports it to safetensors")
    return path


def _read_config_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {**content}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error


def _merge_config(content: Content, config_json: Mapping[str, Any], path: Path) -> tuple[Config, list[str]]:
    """The shapes say most fields and are always right; config.json adds what they cannot say (num_heads, eps)."""
    if config_json.get("format") == FORMAT:
        if config_json.get("version") != VERSION:
            raise ValueError(f"{path} has version {config_json.get('version')!r}; this mm_convert reads {VERSION}")
        said = dict(config_json.get("config", {}))
    else:
        try:
            said = content.family.read_config(config_json)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    contradictions = [
        f"{path} says {field} {said[field]}, the tensors say {value}: the tensors are believed"
        for field, value in content.config.items()
        if field in said and said[field] != value
    ]
    config, notes = content.family.complete({**said, **content.config})
    return config, contradictions + notes

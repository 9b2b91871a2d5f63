"""MindSpeed-MM's tree: one torch file per tensor-parallel and pipeline rank.

    latest_checkpointed_iteration.txt            "release" or a decimal iteration
    release/ or iter_0000500/
        mp_rank_TT/model_optim_rng.pt            one pipeline stage: {"model": {name: tensor}, …}
        mp_rank_TT_PPP/model_optim_rng.pt        several; with virtual stages {"model0": …, "model1": …}

Names are local to a stage: layer numbers start at 0 in each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mm_convert.families.family import Config, Cuts
from mm_convert.files import read_bytes
from mm_convert.store.safetensors import refuse_link_out
from mm_convert.store.torch_file import read_torch_file, write_torch_file
from mm_convert.tensors.stages import Places, Split, join, join_stages, slice_for
from mm_convert.tensors.views import LazyTensor

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"

Stage = dict[str, LazyTensor]


def newest(path: Path) -> Path | None:
    """The folder of the checkpoint that the tracker in `path` names; None without a tracker."""
    tracker = path / TRACKER
    if not tracker.exists():
        return None
    said = read_bytes(tracker, limit=4096).decode("utf-8", "replace").strip()
    if said != "release" and not said.isdecimal():
        raise ValueError(f"{tracker} says {said[:40]!r}; it must say release or a number")
    folder = path / (said if said == "release" else f"iter_{int(said):07d}")
    if not folder.is_dir():
        raise ValueError(f"{tracker} says {said}, but {folder} is not there")
    return folder


def is_tree(folder: Path) -> bool:
    """Whether ranks lie in a folder."""
    return any(folder.glob("mp_rank_*"))


def read_ranks(folder: Path, part: str = "model") -> tuple[list[list[Stage]], list[Path]]:
    """`ranks[tp][stage]`, the stages in the order of the model, with their local names; and the files.

    Args:
        part: "model", or "ema_model" where the optimizer kept a moving average.

    Raises ValueError for ranks that are missing, that differ in what they hold, or that are expert-parallel.
    """
    files: dict[tuple[int, int], Path] = {}
    for directory in sorted(folder.glob("mp_rank_*")):
        match = re.fullmatch(r"mp_rank_(\d{2})(?:_(\d{3}))?", directory.name)
        if not match:
            raise ValueError(f"{directory} is not mp_rank_TT or mp_rank_TT_PPP; expert parallelism is not supported")
        files[int(match[1]), int(match[2] or 0)] = directory / FILE
    tp, pp = (1 + max(key[axis] for key in files) for axis in (0, 1))
    for key in ((t, p) for t in range(tp) for p in range(pp)):
        if key not in files or not files[key].exists():
            where = files.get(key, f"mp_rank_{key[0]:02d}" + (f"_{key[1]:03d}" if pp > 1 else ""))
            raise ValueError(f"{folder} has ranks of tp {tp} and pp {pp}, but {where} is missing")
    for file in files.values():
        refuse_link_out(file, folder.parent)
    models = {key: _models(file, part) for key, file in files.items()}
    if len({len(virtual) for virtual in models.values()}) != 1:
        raise ValueError(f"{folder}: the ranks have different numbers of virtual stages")
    vpp = len(models[0, 0])
    ranks = [[models[t, p][v] for v in range(vpp) for p in range(pp)] for t in range(tp)]
    for t, stages in enumerate(ranks):
        for s, stage in enumerate(stages):
            if differing := set(stage) ^ set(ranks[0][s]):
                raise ValueError(f"{folder}: tp ranks 0 and {t} differ on stage {s}: {sorted(differing)[0]}")
    return ranks, list(files.values())


def _models(file: Path, part: str) -> list[Stage]:
    """The models of one rank's file: one, or one per virtual stage."""
    content = read_torch_file(file)
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds no dictionary, so it is no MindSpeed-MM checkpoint")
    if part == "ema_model" and part not in content and "ema" in content:  # of a run of mm_train, by dcp_to_torch
        part = "ema"
    keys = [part] if part in content else [key for key in content if re.fullmatch(rf"{part}\d+", str(key))]
    keys.sort(key=_virtual)
    if not keys or [_virtual(key) for key in keys] not in ([-1], list(range(len(keys)))):
        raise ValueError(f"{file} holds no {part}; it holds {', '.join(map(str, list(content)[:8]))}")
    for key in keys:
        if not isinstance(content[key], Mapping) or not all(isinstance(name, str) for name in content[key]):
            raise ValueError(f"{file}: its {key} is no dictionary of names and tensors")
    return [
        {
            name.removeprefix("predictor."): tensor
            for name, tensor in content[key].items()
            if isinstance(tensor, LazyTensor) and not name.endswith("_extra_state")
        }
        for key in keys
    ]


def _virtual(key: str) -> int:
    number = re.search(r"\d+$", key)
    return int(number[0]) if number else -1


def _join(name: str, slices: list[LazyTensor], cuts: Cuts) -> LazyTensor:
    try:
        whole = join(name, slices, cuts)
    except ValueError as error:
        raise ValueError(f"{name} differs in kind between the tensor-parallel ranks: {error}") from error
    if whole is slices[0] and any(_beginning(other) != _beginning(whole) for other in slices[1:]):
        raise ValueError(f"{name} should be the same on all tensor-parallel ranks, and is not: which is right?")
    return whole


def _beginning(tensor: LazyTensor) -> bytes:
    """Some rows, to compare by: all of the rest would have to be read only to look at a checkpoint."""
    return bytes(tensor.read(0, min(tensor.height, max(1, 2**16 // max(1, tensor.row_bytes)))))


def join_ranks(ranks: list[list[Stage]], cuts: Cuts) -> tuple[Stage, dict[str, list[int]]]:
    """The whole tensors under global names, and each ladder's layers per stage.

    A tied tensor that is repeated on the last stage stays; raises ValueError for another that is on two stages.
    """
    stages = [
        {name: _join(name, [rank[stage][name] for rank in ranks], cuts) for name in ranks[0][stage]}
        for stage in range(len(ranks[0]))
    ]
    return join_stages(stages, cuts)


RankFiles = dict[str, tuple[int, Callable[[Path, Callable[[int], None]], None]]]


def tree_files(tensors: Mapping[str, LazyTensor], split: Split, cuts: Cuts, config: Config) -> RankFiles:
    """The files of a release: path in it -> bytes, and what writes them.

    Args:
        tensors: whole, under MindSpeed-MM's names, layer numbers global.
        split: checked.
    """
    place = Places(split, cuts, config)
    stages: list[Stage] = [{} for _ in range(split.stages)]
    for name, tensor in tensors.items():
        stage, local = place(name)
        stages[stage][local] = tensor
    if cuts.tied and cuts.tied[1] not in tensors and split.pp > 1:
        stages[place(cuts.tied[1])[0]][cuts.tied[1]] = tensors[cuts.tied[0]]
    return rank_files(stages, split, cuts)


def rank_files(stages: list[Stage], split: Split, cuts: Cuts) -> RankFiles:
    """The files of all ranks, from what each stage holds under its own names."""
    files: RankFiles = {}
    for t in range(split.tp):
        for p in range(split.pp):
            own = [stages[v * split.pp + p] for v in range(split.vpp)]
            models = [{n: slice_for(n, x, cuts, t, split.tp) for n, x in sorted(stage.items())} for stage in own]
            content: dict[str, Any] = {"model": models[0]}
            if split.vpp > 1:
                content = {f"model{v}": model for v, model in enumerate(models)}
            if split.vpp > 1 or cuts.version:
                content["checkpoint_version"] = 3.0
            name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if split.pp > 1 else "")
            nbytes = sum(tensor.nbytes for model in models for tensor in model.values())
            files[f"{name}/{FILE}"] = nbytes, partial(_write, content)
    return files


def _write(content: Mapping[str, Any], path: Path, progress: Callable[[int], None]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_torch_file(path, content, progress)

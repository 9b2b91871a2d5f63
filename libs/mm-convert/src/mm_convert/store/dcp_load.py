"""torch.distributed.checkpoint.load with a reader that runs nothing: torch's own unpickles the index, and every value
that is no tensor, as it finds them. Needs torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from mm_convert.store.dcp import Description, Index
from mm_convert.store.unpickle import Opaque
from mm_convert.tensors.torch import DTYPES, Maps
from mm_convert.tensors.views import LazyTensor

_MAX_VALUE = 100_000  # numbers and texts in one value


def load_dcp(state: dict[str, Any], folder: str | Path, group: ProcessGroup | None = None) -> None:
    """Fill a nested state in place, as torch's `dcp.load`; all ranks of `group` call it, a single process without.

    Only the index, tensors, numbers and text are read; nothing that the folder contains is run.
    Raises CheckpointException on all ranks where one of them cannot read what it needs.
    """
    dcp.load(
        state, storage_reader=_Reader(Path(folder)), planner=_Planner(), process_group=group, no_dist=group is None
    )


class _Reader(StorageReader):
    def __init__(self, folder: Path) -> None:
        self.folder, self.maps = folder, Maps()
        self.error: Exception | None = None

    def read_metadata(self) -> Metadata:
        try:
            self.index = Index(self.folder)
            described = {name: _as_torch(self.index.describe(name)) for name in self.index.names}
        except Exception as error:  # torch would log its traceback and look for another index
            self.error, described = error, {}
        return Metadata(described, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        if self.error:
            raise self.error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            name, offset = item.storage_index.fqn, item.storage_index.offset
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, _plain(self.index.value(name), f"{self.folder}: {name}"))
                continue
            chunk = self.maps.tensor(self.index.chunk(name, tuple(offset)))
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                chunk = chunk.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            if target.shape != chunk.shape:
                raise ValueError(f"{self.folder}: {name} is {list(chunk.shape)} where {list(target.shape)} is wanted")
            target.copy_(chunk)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Set what is no tensor; `value` is itself, not its pickle."""
        name = read_item.dest_index.fqn
        if isinstance(self.state_dict[name], torch.Tensor):
            raise ValueError(f"{name} should be a tensor, but there lies {type(value).__name__}")
        set_element(self.original_state_dict, self.mappings[name], value)


def _as_torch(described: Description | None) -> TensorStorageMetadata | BytesStorageMetadata:
    if described is None:
        return BytesStorageMetadata()
    return TensorStorageMetadata(
        TensorProperties(DTYPES[described.dtype]),
        torch.Size(described.shape),
        [ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)) for offset, sizes in described.chunks],
    )


def _plain(value: Any, where: str) -> Any:
    """A value of numbers, text, lists and dictionaries. Raises ValueError for another, and for one without end."""
    inside = [value]
    for count, part in enumerate(inside):  # grows on the way
        if isinstance(part, (Opaque, LazyTensor)) or count >= _MAX_VALUE:
            what = "endless" if count >= _MAX_VALUE else repr(part)
            raise ValueError(f"{where} is {what}, where a training checkpoint has numbers and text")
        if isinstance(part, dict):
            inside += part.values()
        elif isinstance(part, (list, tuple, set, frozenset)):
            inside += part
    return value

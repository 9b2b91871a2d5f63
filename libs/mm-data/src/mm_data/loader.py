"""Steps of training data: the same stream for every number of ranks and workers, from any cursor.

Workers are threads. Reading features copies memory-mapped files, and raw clips are decoded and scaled in C: both free
the interpreter. So nothing is pickled, no memory is shared, and no child can die unseen. An error in a worker is raised
where the loader is iterated, at the step that it belongs to.
"""

import hashlib
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, Generic, TypeVar

from mm_data.batch import BatchDataset, PackedDataset
from mm_data.order import Order, SmallBuckets

Made = TypeVar("Made")  # what the data set makes of samples: a Batch, or e.g. a ClipBatch


@dataclass(frozen=True)
class Step(Generic[Made]):
    """One rank's share of an optimizer step: micro batches of one bucket. Every rank has as many."""

    index: int  # counts from 0 over the whole training, also after a resume
    cursor_after: int  # samples that all ranks have seen after this step: what to resume from
    micro: list[Made]
    digest: int = 0  # of the plan of packed samples: alike on all ranks that find the same files. 0 without a plan


Share = tuple[Sequence[tuple[Any, ...]], int]  # of a rank: the arguments of `batch` for each micro batch; the digest


class Loader(Generic[Made]):
    """An endless iterator over steps, from `cursor` on; each `iter()` starts there again. See `build_loader`."""

    def __init__(
        self,
        dataset: BatchDataset[Made],
        order: Order,
        *,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        cursor: int,
        num_workers: int,
    ):
        self.dataset = dataset
        self.order = order
        self.micro_batch = micro_batch
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.cursor = cursor
        self.num_workers = num_workers

    def __iter__(self) -> Iterator[Step[Made]]:
        step = self.cursor // self.order.global_batch
        if self.num_workers == 0:
            while True:
                share, digest = self.share(step)
                yield self._step(step, [self.dataset.batch(*arguments) for arguments in share], digest)
                step += 1
        ahead = _Ahead(self, step)
        try:
            while True:
                yield self._step(step, *ahead.take())
                step += 1
        finally:
            ahead.close()

    def share(self, step: int) -> Share:
        """This rank's micro batches: what is planned for it, or a contiguous piece of the global batch."""
        picks = self.order.step(step)
        if isinstance(self.dataset, PackedDataset):
            plan = self.dataset.plan(picks, self.dp_size)
            digest = hashlib.blake2b(repr(plan).encode(), digest_size=7).digest()
            return plan[self.dp_rank], int.from_bytes(digest, "big")
        own = len(picks) // self.dp_size
        first = self.dp_rank * own
        return [(picks[i : i + self.micro_batch],) for i in range(first, first + own, self.micro_batch)], 0

    def _step(self, step: int, micro: list[Made], digest: int) -> Step[Made]:
        return Step(step, (step + 1) * self.order.global_batch, micro, digest)


@dataclass
class _Making(Generic[Made]):
    """A step that threads work on."""

    planned: Future[int]  # the digest
    micro: list[Future[Made]] = field(default_factory=list)  # none before it is planned


class _Ahead(Generic[Made]):
    """The steps that are made before they are asked for: two at least, and enough for every thread.

    A thread of its own plans, one step after another: as soon as one is planned, its micro batches are given to the
    others. What goes wrong is raised where its step is taken.
    """

    def __init__(self, loader: Loader[Made], step: int):
        self.loader, self.next = loader, step
        self.pool = ThreadPoolExecutor(loader.num_workers, thread_name_prefix="mm_data loader")
        self.planner = ThreadPoolExecutor(1, thread_name_prefix="mm_data planner")
        self.steps: deque[_Making[Made]] = deque()
        self.lock = RLock()
        self.closed = False

    def take(self) -> tuple[list[Made], int]:
        self._fill()
        step = self.steps[0]
        digest = step.planned.result()
        with self.lock:
            self.steps.popleft()
        return [batch.result() for batch in step.micro], digest

    def close(self) -> None:
        with self.lock:
            self.closed = True
        for executor in (self.planner, self.pool):
            executor.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        """Begin a step if there is room for one and the last is planned."""
        with self.lock:
            if self.closed or (self.steps and not self.steps[-1].micro):
                return
            if len(self.steps) < 2 or sum(len(step.micro) for step in self.steps) < 2 * self.loader.num_workers:
                step = _Making(Future())
                self.steps.append(step)
                self.planner.submit(self._plan, step, self.next)
                self.next += 1

    def _plan(self, step: _Making[Made], number: int) -> None:
        try:
            share, digest = self.loader.share(number)
        except BaseException as error:
            step.planned.set_exception(error)
            return
        with self.lock:
            if self.closed:
                return
            step.micro = [self.pool.submit(self.loader.dataset.batch, *arguments) for arguments in share]
        step.planned.set_result(digest)
        self._fill()


def build_loader(
    dataset: BatchDataset[Made],
    *,
    global_batch: int,
    micro_batch: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    seed: int = 0,
    cursor: int = 0,
    num_workers: int = 2,
    small_buckets: SmallBuckets | None = None,
) -> Loader[Made]:
    """The training stream of one data-parallel rank.

    global_batch: samples per optimizer step, over all ranks; each rank gets global_batch / dp_size of them in micro
    batches of `micro_batch`. cursor: samples seen so far by all ranks, `Step.cursor_after` of the last finished step.
    num_workers: threads that read or decode; 0 does it in the caller's. Two micro batches per thread are held in
    memory, and two steps at least, which is much for raw clips. small_buckets: what becomes of buckets with fewer
    samples than `global_batch`, see `Order`; by default they are repeated, with a warning.

    A data set that packs its samples (`PackedDataset`) plans the micro batches itself, and `micro_batch` is not used.

    The steps, put together over ranks, depend on the data set, `global_batch`, `seed`, `small_buckets` and `cursor`
    only. Raises ValueError for sizes that do not divide, and where dropping leaves nothing.
    """
    packed = isinstance(dataset, PackedDataset)
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank={dp_rank} must be in 0..{dp_size - 1}, for dp_size={dp_size}")
    for name, value in (("global_batch", global_batch), ("micro_batch", micro_batch)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    unit = dp_size if packed else dp_size * micro_batch
    if global_batch % unit:
        near = max(unit, global_batch // unit * unit)
        how = "" if packed else f" in micro batches of {micro_batch}"
        of = f"{dp_size}" if packed else f"{dp_size} x {micro_batch} = {unit}"
        raise ValueError(
            f"global_batch={global_batch} cannot be split over {dp_size} data-parallel ranks{how}: it must be a "
            f"multiple of {of}, e.g. {near} or {near + unit}"
        )
    if cursor < 0 or cursor % global_batch:
        near = max(0, cursor // global_batch * global_batch)
        raise ValueError(
            f"cursor={cursor} does not lie between two steps of global_batch={global_batch}: was it saved with another "
            f"global_batch? Keep that one, or begin at cursor {near} or {near + global_batch}"
        )
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} must not be negative")
    order = Order(dataset.buckets, global_batch, seed, small_buckets or "repeat", getattr(dataset, "sets", ()))
    if order.small and small_buckets is None:
        warnings.warn(f"{order.small.describe()} Give small_buckets to choose.", stacklevel=2)
    return Loader(
        dataset,
        order,
        micro_batch=micro_batch,
        dp_rank=dp_rank,
        dp_size=dp_size,
        cursor=cursor,
        num_workers=num_workers,
    )

"""Steps of training data: the same stream for every number of ranks and workers, from any cursor.

Workers are threads. Reading features copies memory-mapped files, and raw clips are decoded and scaled in C: both free
the interpreter. So nothing is pickled, no memory is shared, and no child can die unseen. An error in a worker is raised
where the loader is iterated, at the step that it belongs to.
"""

import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from mm_data.batch import BatchDataset, Pick
from mm_data.order import Order, SmallBuckets

Made = TypeVar("Made")  # what the data set makes of samples: a Batch, or e.g. a ClipBatch


@dataclass(frozen=True)
class Step(Generic[Made]):
    """One rank's share of an optimizer step: micro batches of one bucket."""

    index: int  # counts from 0 over the whole training, also after a resume
    cursor_after: int  # samples that all ranks have seen after this step: what to resume from
    micro: list[Made]


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
                yield self._step(step, [self.dataset.batch(picks) for picks in self._share(step)])
                step += 1
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="mm_data loader")
        ahead: deque[list[Future[Made]]] = deque()
        try:
            while True:
                # the step asked for, and work for every thread
                while len(ahead) < 2 or sum(map(len, ahead)) < 2 * self.num_workers:
                    ahead.append([pool.submit(self.dataset.batch, picks) for picks in self._share(step + len(ahead))])
                yield self._step(step, [batch.result() for batch in ahead.popleft()])
                step += 1
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _share(self, step: int) -> list[list[Pick]]:
        """This rank's micro batches: a contiguous piece of the global batch."""
        picks = self.order.step(step)
        own = len(picks) // self.dp_size
        first = self.dp_rank * own
        return [picks[i : i + self.micro_batch] for i in range(first, first + own, self.micro_batch)]

    def _step(self, step: int, micro: list[Made]) -> Step[Made]:
        return Step(step, (step + 1) * self.order.global_batch, micro)


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
    memory, which is much for raw clips. small_buckets: what becomes of buckets with fewer samples than `global_batch`,
    see `Order`; by default they are repeated, with a warning.

    The steps, put together over ranks, depend on the data set, `global_batch`, `seed`, `small_buckets` and `cursor`
    only. Raises ValueError for sizes that do not divide, and where dropping leaves nothing.
    """
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank={dp_rank} must be in 0..{dp_size - 1}, for dp_size={dp_size}")
    for name, value in (("global_batch", global_batch), ("micro_batch", micro_batch)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    unit = dp_size * micro_batch
    if global_batch % unit:
        near = max(unit, global_batch // unit * unit)
        raise ValueError(
            f"global_batch={global_batch} cannot be split over {dp_size} data-parallel ranks in micro batches of "
            f"{micro_batch}: it must be a multiple of {dp_size} x {micro_batch} = {unit}, e.g. {near} or {near + unit}"
        )
    if cursor < 0 or cursor % global_batch:
        near = max(0, cursor // global_batch * global_batch)
        raise ValueError(
            f"cursor={cursor} does not lie between two steps of global_batch={global_batch}: was it saved with another "
            f"global_batch? Keep that one, or begin at cursor {near} or {near + global_batch}"
        )
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} must not be negative")
    order = Order(dataset.buckets, global_batch, seed, small_buckets or "repeat")
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

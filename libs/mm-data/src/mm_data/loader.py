"""Steps of training data: the same stream for every number of ranks and workers, from any cursor.

Reading features is copying memory-mapped files, and raw clips are decoded and scaled in C; both free the interpreter,
so workers are threads: no pickling, no shared memory, no child that can die unseen. An error in a worker is raised
where the loader is iterated, at the step that it belongs to.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from mm_data import random
from mm_data.clips import ClipBatch, ClipDataset
from mm_data.features import Batch, FeatureDataset
from mm_data.order import Order, Pick


@dataclass(frozen=True)
class Step:
    """One rank's share of an optimizer step: micro batches of one shape."""

    index: int  # counts from 0 over the whole training, also after a resume
    cursor_after: int  # samples that all ranks have seen after this step: what to resume from
    micro: list[Batch] | list[ClipBatch]  # as the data set makes them


class Loader:
    """An endless iterator over steps, from `cursor` on; each `iter()` starts there again. See `build_loader`."""

    def __init__(
        self,
        dataset: FeatureDataset | ClipDataset,
        order: Order,
        *,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        cursor: int,
        num_workers: int,
        text_dropout: float,
    ):
        self.dataset = dataset
        self.order = order
        self.micro_batch = micro_batch
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.cursor = cursor
        self.num_workers = num_workers
        self.text_dropout = text_dropout

    def __iter__(self) -> Iterator[Step]:
        step = self.cursor // self.order.global_batch
        if self.num_workers == 0:
            while True:
                yield self._step(step, [self.dataset.batch(picks) for picks in self._share(step)])
                step += 1
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="mm_data loader")
        ahead: deque[list[Future[Batch | ClipBatch]]] = deque()
        try:
            while True:
                while (
                    len(ahead) < 2 or sum(map(len, ahead)) < 2 * self.num_workers
                ):  # the step asked for, and work for every thread
                    ahead.append([pool.submit(self.dataset.batch, picks) for picks in self._share(step + len(ahead))])
                yield self._step(step, [batch.result() for batch in ahead.popleft()])
                step += 1
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _share(self, step: int) -> list[list[Pick]]:
        """This rank's micro batches: a contiguous piece of the global batch."""
        picks = self.order.step(step)
        own = len(picks) // self.dp_size
        mine = [
            Pick(index, epoch, self._caption(index, epoch))
            for index, epoch in picks[self.dp_rank * own : (self.dp_rank + 1) * own]
        ]
        return [mine[i : i + self.micro_batch] for i in range(0, own, self.micro_batch)]

    def _step(self, step: int, micro: list[Batch] | list[ClipBatch]) -> Step:
        return Step(step, (step + 1) * self.order.global_batch, micro)

    def _caption(self, index: int, epoch: int) -> int | None:
        """Which of its captions a sample shows in an epoch; None: the empty prompt."""
        draw = (self.order.seed, epoch, self.dataset.ids[index])
        if random.uniform(*draw, "caption_drop") < self.text_dropout:
            return None
        return random.integer(self.dataset.num_captions[index], *draw, "caption")


def build_loader(
    dataset: FeatureDataset | ClipDataset,
    *,
    global_batch: int,
    micro_batch: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    seed: int = 0,
    cursor: int = 0,
    num_workers: int = 2,
    text_dropout: float = 0.0,
) -> Loader:
    """The training stream of one data-parallel rank.

    global_batch: samples per optimizer step, over all ranks; each rank gets global_batch / dp_size of them in micro
    batches of `micro_batch`. cursor: samples seen so far by all ranks, `Step.cursor_after` of the last finished step.
    num_workers: threads that read or decode; 0 does it in the caller's. Two micro batches per thread are held in
    memory, which is much for raw clips. text_dropout: share of samples that are shown with the empty prompt. The steps,
    put together over ranks, depend on the data set, `global_batch`, `seed` and `cursor` only. Raises ValueError for
    sizes that do not divide.
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
    if not 0 <= text_dropout <= 1:
        raise ValueError(f"text_dropout={text_dropout} must be a probability, 0 to 1")
    if text_dropout and dataset.empty_text is None:
        raise ValueError(
            f"text_dropout={text_dropout} needs the encoding of the empty prompt, which {dataset.path} does not hold: "
            "use text_dropout=0, or extract again"
        )
    if text_dropout < 1 and 0 in dataset.num_captions:
        raise ValueError(f"{dataset.path}: sample {dataset.ids[dataset.num_captions.index(0)]} has no caption")
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} must not be negative")
    order = Order(dataset.shapes, global_batch, seed)
    return Loader(
        dataset,
        order,
        micro_batch=micro_batch,
        dp_rank=dp_rank,
        dp_size=dp_size,
        cursor=cursor,
        num_workers=num_workers,
        text_dropout=text_dropout,
    )

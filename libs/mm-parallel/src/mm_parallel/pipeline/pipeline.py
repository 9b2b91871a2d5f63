"""A model in stages, each on a rank of its own.

    before                              after (two ranks, two virtual stages each: pp_layers [[1, 1], [1, 1]])

    every rank: stem 0 1 2 3 head       rank 0: stem 0 . 2 .        rank 1: . 1 . 3 head

Stages send each other the tensors of the stream. Micro-batches follow each other, so that all ranks are busy but for
the *bubble*: while the first is on its way up, and the last on its way down.
"""

import inspect
from collections.abc import Callable, Mapping
from inspect import BoundArguments
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.config import MemoryConfig, ParallelConfig
from mm_parallel.guard import agree_on
from mm_parallel.mesh import rank_in, size
from mm_parallel.order import cut
from mm_parallel.pipeline.chunk import Chunk, Stage, call
from mm_parallel.pipeline.cut import ranges
from mm_parallel.pipeline.outline import Outline, describe, describe_call, skeleton, tensors_of, trace
from mm_parallel.pipeline.prune import Owner, prune
from mm_parallel.pipeline.schedule import Schedule, check_count
from mm_parallel.plan import ParallelPlan

_WHO = "the ranks of a pipeline"


class Pipeline:
    """Cuts `model` in place into the stages of `parallel.pp_layers`, and these as `parallelize` does.

    model: what is left of it on this rank, with the names of the whole: for the optimizer and for checkpoints.
    elsewhere: names in the state dict that other ranks hold.

    `layer(i, stream)` may use its module, its companions and the stream, and nothing else that has weights. Freeze
    what is frozen before.
    Raises ValueError for stages that do not fit the model, for a weight that two stages would share, and for what
    `parallelize` does not allow.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ParallelPlan,
        mesh: DeviceMesh,
        parallel: ParallelConfig,
        memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
        dtype: torch.dtype | None = None,
    ) -> None:
        ranks = parallel.pp
        if ranks == 1 or size(mesh, "pp") != ranks:
            raise ValueError(
                f"pp_layers {parallel.pp_layers} are stages for {ranks} ranks, the mesh has {size(mesh, 'pp')}: "
                "a Pipeline needs at least two, and the mesh of its own layout (make_mesh)"
            )
        self.zero_bubble = parallel.schedule == "zero_bubble"
        if self.zero_bubble and _recomputes(memory):
            raise ValueError(
                f"schedule zero_bubble with recompute={memory.recompute!r}, but_attention={memory.but_attention}: it "
                "splits a backward in two, and what was recomputed for the first is gone for the second. Use schedule "
                "1f1b, or recompute nothing"
            )
        plan.check(model)
        parts = ranges(parallel.stages, len(model.layers))
        stages = [Stage(i, len(parts), part) for i, part in enumerate(parts)]
        self.stages, self.mine = stages, stages[rank_in(mesh, "pp") :: ranks]
        self.ranks, self.group = ranks, mesh.get_group("pp")
        self.device = torch.device(mesh.device_type)
        self.skeleton = skeleton(model, plan, mesh, dtype, trained=self.zero_bubble)
        kept: set[Owner] = {i for stage in self.mine for i in stage.layers}
        kept |= {"first"} if self.mine[0].is_first else set()
        kept |= {"last"} if self.mine[-1].is_last else set()
        self.elsewhere = prune(model, plan.last, plan.companions, kept)
        cut(model, plan.on(model), mesh, memory, dtype)
        model.forward = call
        self.model, self.memory = model, memory
        self._signature = inspect.signature(self.skeleton.stem)
        self._outlines: dict[str, Outline] = {}
        self._newest: tuple[str, Schedule | None] = ("", None)

    def step(
        self,
        count: int,
        inputs: Callable[[int], Mapping[str, Any]],
        losses: Callable[[Tensor, int], Tensor],
        share: float,
    ) -> list[Tensor]:
        """Adds the gradient of the losses of `count` micro-batches, over `share`, to the gradients that are there.

        inputs: number of a micro-batch -> arguments of the model by name. All of a step have the same shapes; those of
            steps may differ. Every rank is asked for number 0, to compare shapes; the first stage for all.
        losses: (output, number) -> losses, of any shape; their sum is what counts. The last stage is asked.
        share: this rank's part of the weight of the whole step, see `mm_parallel.forward_backward`.

        Returns the losses, detached, on the rank of the last stage, elsewhere []. Raises ValueError where ranks were
        given different shapes or counts, and for a count that the schedule cannot do.
        """
        if count < 1:
            raise ValueError(f"a step of {count} micro-batches: at least 1 is needed")
        first = self._signature.bind(**inputs(0))
        shape = describe_call(first)
        what = f"a step of {count} x ({shape})"
        agree_on(what, _WHO, self.group, self.device)

        def batch(number: int) -> BoundArguments:
            bound = self._signature.bind(**inputs(number)) if number else first
            if (other := describe_call(bound)) != shape:
                raise ValueError(f"micro-batch {number} is {other}, but the step began with {shape}")
            return bound

        return self._schedule(what, count, first).step(batch, losses, share)

    def _schedule(self, what: str, count: int, first: BoundArguments) -> Schedule:
        """The one of the step before, or a new one. Only one is kept, because it holds a receive buffer for each
        micro-batch; another takes milliseconds to make."""
        if self._newest[0] != what:
            check_count(count, self.ranks, len(self.mine), self.zero_bubble)
            self._newest = ("", None)
            outline = self._outline(first)
            chunks = [Chunk(stage, self.model, outline, self.zero_bubble) for stage in self.mine]
            schedule = Schedule(chunks, outline, count, self.zero_bubble, self.memory.reshard, self.device, self.group)
            self._newest = (what, schedule)
        return self._newest[1]

    def _outline(self, call: BoundArguments) -> Outline:
        shape = describe_call(call)
        if shape not in self._outlines:
            starts = [stage.layers.start for stage in self.stages]
            self._outlines[shape] = trace(self.skeleton, starts, call)
        return self._outlines[shape]

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The model's output, on every rank of the pipeline; without gradients."""
        batch = self._signature.bind(*args, **kwargs)
        agree_on(f"a forward of {describe_call(batch)}", _WHO, self.group, self.device)
        outline = self._outline(batch)
        output = self._empty(outline.output)
        for stage in self.mine:
            chunk = Chunk(stage, self.model, outline, tracked=False)
            if stage.is_first:
                chunk.inputs = lambda _: batch
                tensors = [torch.zeros(1)]
            else:
                tensors = list(map(self._empty, tensors_of(outline.entries[stage.index])))
                for tensor in tensors:
                    dist.recv(tensor, group=self.group, group_src=(stage.index - 1) % self.ranks)
            result = chunk(*tensors)
            if stage.is_last:
                output = result.contiguous()
                assert describe(output) == describe(outline.output), (describe(output), describe(outline.output))
            else:
                for tensor in result:
                    dist.send(tensor, group=self.group, group_dst=(stage.index + 1) % self.ranks)
        dist.broadcast(output, group=self.group, group_src=self.ranks - 1)
        return output

    def _empty(self, meta: Tensor) -> Tensor:
        return torch.empty(meta.shape, dtype=meta.dtype, device=self.device)

    @property
    def training(self) -> bool:
        return self.model.training

    def train(self, mode: bool = True) -> Self:
        self.model.train(mode)
        return self

    def eval(self) -> Self:
        return self.train(False)


def _recomputes(memory: MemoryConfig) -> bool:
    asked = memory.recompute
    words = {asked} if isinstance(asked, (str, int)) else set(asked)
    return bool(words - {"none", 0}) or memory.but_attention > 0

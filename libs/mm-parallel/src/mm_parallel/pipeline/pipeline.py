"""A model in stages, each on a rank of its own.

    before                              after (two ranks, two virtual stages each: pp_layers [[1, 1], [1, 1]])

    every rank: stem 0 1 2 3 head       rank 0: stem 0 . 2 .        rank 1: . 1 . 3 head

Stages send each other the tensors of the stream. Micro-batches follow each other, so that all ranks are busy but for
the *bubble*: while the first is on its way up, and the last on its way down.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from inspect import BoundArguments
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.config import AttentionName, MemoryConfig, ParallelConfig
from mm_parallel.frozen import check_frozen
from mm_parallel.guard import agree_on
from mm_parallel.mesh import rank_in, size
from mm_parallel.order import cut
from mm_parallel.pipeline.chunk import Chunk, Stage, call
from mm_parallel.pipeline.cut import ranges
from mm_parallel.pipeline.outline import (
    Outline,
    begin,
    describe,
    describe_call,
    describe_shapes,
    shape,
    skeleton,
    tensors_of,
    trace,
)
from mm_parallel.pipeline.prune import Owner, prune
from mm_parallel.pipeline.recent import Recent
from mm_parallel.pipeline.schedule import Schedule, check_count
from mm_parallel.plan import ParallelPlan

_WHO = "the ranks of a pipeline"


def check_stages(
    model: nn.Module, plan: ParallelPlan, parallel: ParallelConfig, memory: MemoryConfig
) -> Sequence[range]:
    """The layers of each stage; needs no process group. ValueError for what a `Pipeline` cannot do with this model.

    plan: checked.
    """
    if parallel.schedule == "zero_bubble" and _recomputes(memory):
        raise ValueError(
            f"schedule zero_bubble with recompute={memory.recompute!r}, but_attention={memory.but_attention}: it "
            "splits a backward in two, and what was recomputed for the first is gone for the second. Use schedule "
            "1f1b, or recompute nothing"
        )
    if parallel.schedule == "zero_bubble" and memory.reduce == "bfloat16":
        raise ValueError(
            "schedule zero_bubble with reduce='bfloat16': it adds the gradients of all micro-batches up before it "
            "reduces them, and would do so in bfloat16. Use schedule 1f1b, which adds up in fp32, or reduce "
            "'float32'"
        )
    if plan.vocabulary and not set(plan.vocabulary) & set(plan.last):
        raise ValueError(
            f"pp_layers {parallel.pp_layers} with a tied head: {plan.vocabulary[0]} is used by the first stage and "
            "by the last, and each weight lives on one. Leave pp_layers out (FSDP, tp and cp take a tied head), or "
            "build the model with a head of its own"
        )
    return ranges(parallel.stages, len(model.layers))


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
        attention: AttentionName = "auto",
        compile: bool | str = False,
    ) -> None:
        ranks = parallel.pp
        if ranks == 1 or size(mesh, "pp") != ranks:
            raise ValueError(
                f"pp_layers {parallel.pp_layers} are stages for {ranks} ranks, the mesh has {size(mesh, 'pp')}: "
                "a Pipeline needs at least two, and the mesh of its own layout (make_mesh)"
            )
        self.zero_bubble = parallel.schedule == "zero_bubble"
        if self.zero_bubble and compile:
            raise ValueError(
                "schedule zero_bubble with compile: it splits a backward in two, and that of compiled code is one. Use "
                "schedule 1f1b, or leave compile out"
            )
        plan.check(model)
        parts = check_stages(model, plan, parallel, memory)
        check_frozen(model, plan, memory, size(mesh, "tp"))
        stages = [Stage(i, len(parts), part) for i, part in enumerate(parts)]
        self.stages, self.mine = stages, stages[rank_in(mesh, "pp") :: ranks]
        self.ranks, self.group = ranks, mesh.get_group("pp")
        self.device = torch.device(mesh.device_type)
        self.skeleton = skeleton(model, plan, mesh, dtype, trained=self.zero_bubble)
        kept: set[Owner] = {i for stage in self.mine for i in stage.layers}
        kept |= {"first"} if self.mine[0].is_first else set()
        kept |= {"last"} if self.mine[-1].is_last else set()
        self.elsewhere = prune(model, plan.last, plan.companions, kept)
        cut(model, plan.on(model), mesh, memory, dtype, attention, compile)
        model.forward = call
        self.model, self.plan, self.memory = model, plan, memory
        self._signature = inspect.signature(self.skeleton.stem)
        # by what the model is called with, by the names of that, by what travels
        self._begun, self._traced, self._outlines = Recent(256), Recent(16), Recent(64)
        self._newest: tuple[Outline | None, Schedule | None] = (None, None)

    def step(
        self,
        count: int,
        inputs: Callable[[int], Mapping[str, Any]],
        losses: Callable[[Tensor, int], Tensor],
        share: float,
        outlines: Callable[[int], Mapping[str, Any]] | None = None,
    ) -> list[Tensor]:
        """Adds the gradient of the losses of `count` micro-batches, over `share`, to the gradients that are there.

        inputs: number of a micro-batch -> arguments of the model by name. The first stage is asked for all; every rank
            for number 0, unless there are outlines.
        losses: (output, number) -> losses, of any shape; their sum is what counts. The last stage is asked.
        share: this rank's part of the weight of the whole step, see `mm_parallel.forward_backward`.
        outlines: number of a micro-batch -> the same arguments, of which shapes, dtypes and facts count: a tensor may
            be on the meta device. Every rank is asked for all. None: all are as number 0.

        Micro-batches of a step may differ in their arguments (patches, grids, segments). What crosses between stages
        has the same shapes for all of them; those of steps may differ.

        Returns the losses, detached, on the rank of the last stage, elsewhere []. Raises ValueError where ranks were
        given different shapes, facts or counts, and for a count that the schedule cannot do.
        """
        if count < 1:
            raise ValueError(f"a step of {count} micro-batches: at least 1 is needed")
        calls = [self._signature.bind(**(outlines or inputs)(number)) for number in range(count if outlines else 1)]
        shapes = list(map(describe_call, calls))
        alike = len(set(shapes)) == 1
        what = f"a step of {count} x ({shapes[0]})" if alike else f"a step of ({'), ('.join(shapes)})"
        agree_on(what, _WHO, self.group, self.device)
        facts = list(map(self._begin, calls))
        crossing = list(map(describe_shapes, facts))
        for number, found in enumerate(crossing):
            if found != crossing[0]:
                raise ValueError(
                    f"micro-batch {number} would send {found} between stages, but the step began with {crossing[0]}: "
                    "they must have the same shapes; pad the micro-batches of a step to one length"
                )

        def batch(number: int) -> BoundArguments:
            bound = calls[0] if not (number or outlines) else self._signature.bind(**inputs(number))
            if (other := describe_call(bound)) != (told := shapes[number if outlines else 0]):
                known = f"was announced as {told}" if outlines else f"the step began with {told}"
                raise ValueError(f"micro-batch {number} is {other}, but {known}")
            return bound

        schedule = self._schedule(self._outline(calls[0], facts[0]), count)
        return schedule.step(batch, facts if outlines else facts * count, losses, share)

    def _schedule(self, outline: Outline, count: int) -> Schedule:
        """The one of the step before, or a new one. Only one is kept, because it holds a receive buffer for each
        micro-batch; another takes milliseconds to make."""
        known, schedule = self._newest
        if schedule is None or schedule.count != count or known is not outline:
            check_count(count, self.ranks, len(self.mine), self.zero_bubble)
            self._newest = (None, None)
            chunks = [Chunk(stage, self.model, outline, self.zero_bubble) for stage in self.mine]
            schedule = Schedule(chunks, outline, count, self.zero_bubble, self.memory.reshard, self.device, self.group)
            self._newest = (outline, schedule)
        return schedule

    def _begin(self, call: BoundArguments) -> Any:
        return self._begun.get(describe_call(call), lambda: begin(self.skeleton, self.plan, call))

    def _outline(self, call: BoundArguments, begun: Any, facts: object = None) -> Outline:
        """One for all calls that send the same shapes; only the first with some arguments runs all layers.

        facts: where the output is asked for, those that its shape may depend on.
        """
        given = [name for name, value in call.arguments.items() if value is not None]
        starts = [stage.layers.start for stage in self.stages]

        def make() -> Outline:
            dtypes = [(name, value.dtype) for name, value in begun._asdict().items() if isinstance(value, Tensor)]
            entries = self._traced.get(f"{given}: {dtypes}", lambda: trace(self.skeleton, starts, call))
            return shape(self.skeleton, entries, begun)

        return self._outlines.get(f"{given}: {describe_shapes(begun)} {facts}", make)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The model's output, on every rank of the pipeline; without gradients."""
        batch = self._signature.bind(*args, **kwargs)
        agree_on(f"a forward of {describe_call(batch)}", _WHO, self.group, self.device)
        facts = self._begin(batch)
        outline = self._outline(batch, facts, [value for value in facts if not isinstance(value, Tensor)])
        output = self._empty(outline.output)
        for stage in self.mine:
            chunk = Chunk(stage, self.model, outline, tracked=False)
            chunk.facts = [facts]
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

"""Whether a model in some layout trains as on one device: losses, every gradient, and the weights after some steps.

    subject = Subject(build, lambda model: TinyLadder.plan, batch)
    check(rank, world, subject, cases)

runs under `spawn`; `every_case` makes the cases: each feature alone, every pair, and a sample of larger sets.
"""

from __future__ import annotations

import itertools
import random
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.config import MemoryConfig, ParallelConfig
from mm_parallel.frozen import frozen_linears
from mm_parallel.grads import by_layout, clip_grad_norm, finish_gradients
from mm_parallel.mesh import data_rank, make_mesh, reports_loss, size
from mm_parallel.order import parallelize
from mm_parallel.pipeline import Pipeline
from mm_parallel.plan import ParallelPlan
from mm_parallel.step import forward_backward
from mm_parallel.testing.compare import assert_same_grads, gather_whole, gradients
from mm_parallel.weights import load_parameters

SAMPLES = 8
STEPS = 3  # of the optimizer
WEIGHTS = (
    1.0,
    0.0,
    5.0,
    2.0,
    0.5,
    3.0,
    7.0,
    1.5,
)  # of the samples' losses; ranks and micro-batches differ in their sums


def take(
    batch: Mapping[str, Tensor], samples: slice, weight: Tensor
) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """Samples in dim 0, and the mean square of what an output is off their target."""
    inputs = {name: tensor[samples] for name, tensor in batch.items()}
    target = inputs.pop("target")
    return inputs, lambda output: weight * (output - target).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Subject:
    """A model to check, with four layers or more.

    build: () -> the model with its weights, the same on every rank. plan: of that model. batch: () -> named inputs of
    the model and `target`, all with 8 samples in dim 0.
    take: (batch, some of its 8 samples, how much each counts) -> (inputs of the model, losses), where losses(output)
        are the weighted losses of these samples. It makes a micro-batch; what two of a pipeline send must be alike.
    """

    build: Callable[[], nn.Module]
    plan: Callable[[nn.Module], ParallelPlan]
    batch: Callable[[], Mapping[str, Any]]
    take: Callable[[Mapping[str, Any], slice, Tensor], tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = take


@dataclass(frozen=True)
class Case:
    """A layout, by the features it is made of."""

    name: str
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(dp_shard=1))
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    micro_batches: int = 1
    meta: bool = False
    compile: bool | str = False
    steps: int = STEPS

    @property
    def ranks(self) -> int:
        p = self.parallel
        return p.dp_replicate * p.dp_shard * (p.ulysses or 1) * (p.ring or 1) * p.tp * p.pp


FEATURES: dict[str, dict[str, Any]] = {
    "copies": {"parallel": {"dp_replicate": 2}},
    "shards": {"parallel": {"dp_shard": 2}},
    "ulysses": {"parallel": {"ulysses": 2}},
    "ring": {"parallel": {"ring": 2}},
    "tensor": {"parallel": {"tp": 2}},
    "pipeline": {"parallel": {"pp_layers": (1, 3)}},
    "virtual": {"parallel": {"pp_layers": ((1, 1), (1, 1))}, "micro_batches": 2},
    "zero-bubble": {"parallel": {"pp_layers": (2, 2), "schedule": "zero_bubble"}, "micro_batches": 2},
    "recompute": {"memory": {"recompute": "full"}},
    "some-recompute": {"memory": {"recompute": 1, "but_attention": 1}},
    "but-attention": {"memory": {"recompute": "but_attention"}},
    "offload-attention": {"memory": {"recompute": "but_attention", "offload": "attention"}},
    "offload-inputs": {"memory": {"recompute": "full", "offload": "inputs"}},
    "accumulate": {"micro_batches": 2},
    "keep-gathered": {"parallel": {"dp_shard": 2}, "memory": {"reshard": False}},
    "prefetch": {"parallel": {"dp_shard": 2}, "memory": {"prefetch": 2}},
    "host-params": {"parallel": {"dp_shard": 2}, "memory": {"offload_params": True}},
    "meta": {"meta": True},
}


def combine(names: Iterable[str]) -> Case | None:
    """The case with these features; None where two want different things, or where one excludes another."""
    merged: dict[str, Any] = {"parallel": {"dp_shard": 1}, "memory": {}}
    for name in names:
        for part, wanted in FEATURES[name].items():
            if not isinstance(wanted, dict):
                merged[part] = max(merged.get(part, wanted), wanted)
                continue
            for key, value in wanted.items():
                if merged[part].get(key, value) != value and (key, merged[part][key]) != ("dp_shard", 1):
                    return None
                merged[part][key] = value
    parallel, memory = ParallelConfig(**merged.pop("parallel")), MemoryConfig(**merged.pop("memory"))
    if parallel.schedule == "zero_bubble" and memory.recompute != "none":
        return None
    case = Case("+".join(names), parallel, memory, **merged)
    samples = SAMPLES // (parallel.dp_replicate * parallel.dp_shard * case.micro_batches)
    return case if case.ranks <= 8 and samples else None


def every_case(seed: int = 0, larger: int = 8, all_of: int = 2) -> dict[int, list[Case]]:
    """By number of ranks: all sets of up to `all_of` features (2: each alone, and every pair for one step; 0: none),
    and `larger` sets of three to six drawn by `seed`.
    """
    draw, names = random.Random(seed), list(FEATURES)
    sets = [names_of for count in range(1, all_of + 1) for names_of in itertools.combinations(names, count)]
    cases = [replace(case, steps=1 if len(names) == 2 else STEPS) for names in sets if (case := combine(names))]
    many: list[Case] = []
    while len(many) < larger:
        case = combine(sorted(draw.sample(names, draw.randint(3, 6))))
        if case and case.ranks > 2 and case not in many:
            many.append(case)
    by_ranks: dict[int, list[Case]] = {}
    for case in cases + many:
        by_ranks.setdefault(case.ranks, []).append(case)
    for own in by_ranks.values():
        own.sort(key=lambda case: str(case.parallel))  # those that share a mesh come together
    return by_ranks


def check(rank: int, world: int, subject: Subject, cases: Iterable[Case], rtol: float = 1e-10) -> None:
    """Trains three steps in each layout and on one device; raises AssertionError naming the case that differs."""
    reference = None
    meshes: dict[ParallelConfig, DeviceMesh | None] = {}  # every mesh has groups, and every group of gloo threads
    for case in cases:
        assert case.ranks == world, (case, world)
        reference = reference or _train_alone(subject)
        if case.parallel not in meshes:
            meshes[case.parallel] = make_mesh(case.parallel, "cpu")
        try:
            _compare(subject, case, meshes[case.parallel], *reference, rtol)
        except BaseException as error:
            raise AssertionError(f"{case}\n{traceback.format_exc()}") from error


def _train_alone(subject: Subject) -> tuple[list[float], list[dict[str, Tensor]], list[float], dict[str, Tensor]]:
    model = subject.build()
    inputs, losses_of = subject.take(subject.batch(), slice(0, SAMPLES), _weights())
    optimizer = _optimizer(model)
    losses, grads, norms = [], [], []
    for _ in range(STEPS):
        loss = losses_of(model(**inputs)).sum() / sum(WEIGHTS)
        loss.backward()
        losses.append(loss.item())
        grads.append({name: grad.clone() for name, grad in gradients(model).items()})
        norms.append(clip_grad_norm(model, 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, grads, norms, {name: p.detach() for name, p in model.named_parameters()}


def _compare(
    subject: Subject,
    case: Case,
    mesh: DeviceMesh | None,
    losses: list[float],
    grads: list[dict[str, Tensor]],
    norms: list[float],
    weights: dict[str, Tensor],
    rtol: float,
) -> None:
    model, batch = subject.build(), subject.batch()
    plan, values = subject.plan(model), {name: p.detach().clone() for name, p in model.state_dict().items()}
    if case.meta:
        model = model.to("meta")
    make = Pipeline if size(mesh, "pp") > 1 else parallelize
    run = make(model, plan, mesh, case.parallel, case.memory, compile=case.compile)
    elsewhere = () if run is model else run.elsewhere
    if case.meta:
        load_parameters(model, values, torch.device("cpu"), elsewhere=elsewhere)
    assert _names_of_all(model) == set(weights), "parameters are lost"

    index, parts = data_rank(mesh)
    share, weights_of = range(index * SAMPLES // parts, (index + 1) * SAMPLES // parts), _weights()
    micro = []
    for numbers in torch.tensor(share).chunk(case.micro_batches):
        samples = slice(int(numbers[0]), int(numbers[-1]) + 1)
        micro.append(subject.take(batch, samples, weights_of[samples]))
    optimizer = _optimizer(model)
    for step in range(case.steps):
        own = forward_backward(
            run,
            case.micro_batches,
            lambda i: micro[i][0],
            lambda output, i: micro[i][1](output),
            sum(WEIGHTS),
            mesh,
            lambda i: {name: _outline(value) for name, value in micro[i][0].items()},
        )
        finish_gradients(model, mesh)
        loss = torch.cat(own).sum() if own and reports_loss(mesh) else torch.zeros((), dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(loss)
        loss = loss.item() / sum(WEIGHTS)
        assert abs(loss / losses[step] - 1) <= rtol, f"step {step}: loss {loss}, on one device {losses[step]}"
        actual = gradients(model)
        expected = {name: grads[step][name] for name in actual}
        assert_same_grads(actual, expected, rtol * 10**step, floor=1e-4 * norms[step])
        goes_on = case.steps > 1
        norm = clip_grad_norm(model, 0.5 if goes_on else float("inf"), mesh).item()
        assert abs(norm / norms[step] - 1) <= rtol * 10**step, f"step {step}: norm {norm}, on one device {norms[step]}"
        if goes_on:
            optimizer.step()
            optimizer.zero_grad()
    trained = gather_whole({name: p.detach() for name, p in model.named_parameters()}) if case.steps == STEPS else {}
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter, weights[name], rtol=100 * rtol, atol=100 * rtol)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = by_layout(p for p in model.parameters() if p.requires_grad)
    return torch.optim.AdamW([{"params": part} for part in trained], lr=1e-2, eps=1e-4, fused=True)


def _weights() -> Tensor:
    return torch.tensor(WEIGHTS, dtype=torch.float64)


def _outline(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _names_of_all(model: nn.Module) -> set[str]:
    names = [*(name for name, _ in model.named_parameters()), *frozen_linears(model)]
    if not dist.is_initialized():
        return set(names)
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, names)
    return set(itertools.chain(*everyone))

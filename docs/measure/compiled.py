"""Whether compiled layers (Inductor, on the CPU) give the loss and every gradient that eager ones give.

    python docs/measure/compiled.py                # all cases; some 25 compilations, a minute each beside other work
    python docs/measure/compiled.py dropout ranks  # those whose name has one of the words

The judge is the eager model in float64 on one device, with the same values: it measures eager and compiled layers of a
dtype alike. An error is |own - judge| / |judge| in the 2-norm, of all gradients as one vector, and of each; a gradient
that is nothing but rounding (a key's bias) counts as 1e-4 of all. Compiled layers are wrong where they are off by more
than 1.5 times what eager ones are off, or in one gradient by more than twice; errors below `NOTHING` are none.
Models are those of tests/test_equivalence.py: 4 layers, 8 samples in the micro-batch.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

from mm_models import build, plan
from mm_models.layers import cast_weights
from mm_models.lora import LoRAConfig, add_lora
from mm_parallel import (
    MemoryConfig,
    ParallelConfig,
    data_rank,
    finish_gradients,
    forward_backward,
    make_mesh,
    parallelize,
)
from mm_parallel.compile import compile_layers, count_graphs
from mm_parallel.testing import gradients, spawn
from mm_parallel.testing.equivalence import SAMPLES, Subject

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "apps/train/tests")]
from runs import arguments, rows, write_features  # noqa: E402
from test_equivalence import SUBJECTS, WAN, conversations, filled, pack, qwen, videos  # noqa: E402

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
NOTHING = {F64: 1e-10, F32: 1e-5, BF16: 1e-3}


class Result(NamedTuple):
    loss: float
    grads: dict[str, Tensor]


def judge(name: str, reference: Result, eager: Result, compiled: Result, dtype: torch.dtype, graphs: int) -> None:
    """Prints a row of the table."""
    total = sum(grad.square().sum().item() for grad in reference.grads.values()) ** 0.5

    def measure(own: Result) -> tuple[float, dict[str, float]]:
        assert own.grads.keys() == reference.grads.keys()
        off = {n: (own.grads[n].double() - grad).norm().item() for n, grad in reference.grads.items()}
        sizes = {n: max(grad.norm().item(), 1e-4 * total) for n, grad in reference.grads.items()}
        return sum(x**2 for x in off.values()) ** 0.5 / total, {n: off[n] / sizes[n] for n in off}

    (of_eager, each_of_eager), (of_compiled, each) = measure(eager), measure(compiled)
    wrong = [n for n in each if not each[n] <= max(2 * each_of_eager[n], NOTHING[dtype])]
    wrong += ["all"] * (not of_compiled <= max(1.5 * of_eager, NOTHING[dtype] / 10))
    worst = max(each, key=each.__getitem__)
    loss = [abs(one.loss / reference.loss - 1) for one in (eager, compiled)]
    print(
        f"| {name} | {loss[0]:.0e} | {loss[1]:.0e} | {of_eager:.1e} | {of_compiled:.1e} | {of_compiled / of_eager:.2f} "
        f"| {len(each)}, {worst} | {each_of_eager[worst]:.1e} | {each[worst]:.1e} | {graphs} "
        f"| {'WRONG: ' + ', '.join(wrong) if wrong else 'right'} |",
        flush=True,
    )


HEAD = (
    "| case | loss off: eager | compiled | gradients off: eager | compiled | ratio | of them the worst | eager "
    "| compiled | graphs | |\n|---|--:|--:|--:|--:|--:|---|--:|--:|--:|---|"
)


def prepare(subject: Subject, dtype: torch.dtype) -> nn.Module:
    """The model as it is trained: masters, and what is frozen in the dtype of the computation. Its values are exact in
    bf16, so that errors are those of the computation.
    """
    model = subject.build()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().double()
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    cast_weights(model, dtype)
    for name, values in trained.items():
        model.get_parameter(name).data = values.to(torch.promote_types(dtype, F32))
    model.compute_dtype = dtype
    return model.train()


def step(
    model: nn.Module, subject: Subject, dtype: torch.dtype, samples: int, mesh: DeviceMesh | None = None
) -> Result:
    """Loss and gradients of the first samples, over all ranks."""
    index, parts = data_rank(mesh)
    own, weights = slice(index * samples // parts, (index + 1) * samples // parts), torch.linspace(1, 2, SAMPLES)
    wide = torch.promote_types(dtype, F32)
    inputs, losses_of = subject.take(subject.batch(), own, weights[own].double())
    inputs = tree_map_only(Tensor, lambda x: x.bfloat16().to(wide) if x.is_floating_point() else x, inputs)
    model.zero_grad()
    torch.manual_seed(3)  # of dropout
    total = weights[:samples].sum().item()
    found = forward_backward(model, 1, lambda _: inputs, lambda output, _: losses_of(output.double()), total, mesh)
    finish_gradients(model, mesh)
    loss = torch.cat(found).sum() / total
    if mesh is not None and parts > 1:
        torch.distributed.all_reduce(loss)
    return Result(loss.item(), {name: grad.clone() for name, grad in gradients(model).items()})


def compare(
    name: str,
    subject: Subject,
    dtype: torch.dtype = F32,
    memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
    samples: int = SAMPLES,
) -> None:
    torch._dynamo.reset()
    alone = prepare(subject, F64)
    parallelize(alone, plan(alone), memory=MemoryConfig(base=memory.base))
    reference = step(alone, subject, F64, samples)
    before, results = count_graphs(), []
    for compile in (False, True):
        model = prepare(subject, dtype)
        parallelize(model, plan(model), memory=memory, dtype=dtype, compile=compile)
        results.append(step(model, subject, dtype, samples))
    judge(name, reference, *results, dtype, count_graphs() - before)


# Subjects beside those of the tests


def lora_with_dropout() -> nn.Module:
    return filled(add_lora(build("wan-tiny", dtype=F64, **WAN), LoRAConfig(rank=3, alpha=6, dropout=0.3)))


def vision_trained() -> nn.Module:
    """Of Qwen2.5-VL the vision tower alone."""
    model = qwen()
    model.requires_grad_(False)
    model.visual.requires_grad_(True)
    return model


DROPOUT = Subject(lora_with_dropout, plan, videos)
VISION = Subject(vision_trained, plan, conversations, pack)


# Cases


def in_families(dtype: torch.dtype) -> None:
    word = str(dtype).removeprefix("torch.")
    compare(f"wan, {word}", SUBJECTS["wan"], dtype)
    compare(f"wan, {word}, one sample", SUBJECTS["wan"], dtype, samples=1)  # whose modulation is another kernel
    for name in ("wan-image", "opensoraplan-masked", "qwen2.5-vl", "vace-on-frozen", "wan-per-token", "vace"):
        compare(f"{name}, {word}", SUBJECTS[name], dtype)
    compare(f"qwen2.5-vl, vision tower alone trained, {word}", VISION, dtype)


def dropout() -> None:
    for words in ("none", "full"):
        compare(f"dropout in LoRA, float32, {words}", DROPOUT, memory=MemoryConfig(words))


def frozen_base() -> None:
    compare("LoRA on nf4, float32", SUBJECTS["wan-lora"], memory=MemoryConfig(base="nf4"))
    compare("LoRA on int8, bfloat16", SUBJECTS["wan-lora"], BF16, MemoryConfig(base="int8"))
    compare("LoRA on nf4 of qwen2.5-vl, float32", SUBJECTS["qwen2.5-vl-lora"], memory=MemoryConfig(base="nf4"))


def recompute() -> None:
    for name in ("wan", "opensoraplan-masked", "qwen2.5-vl"):
        for words in ("full", "but_attention"):
            compare(f"{name}, bfloat16, {words}", SUBJECTS[name], BF16, MemoryConfig(words))


def on_two_ranks(rank: int, world: int, name: str, layout: dict[str, int]) -> tuple[list, int]:
    """Loss and gradients (numpy, as tensors would be files of a process that has ended) of an eager step on the ranks,
    and of a compiled one.
    """
    mesh, results = make_mesh(ParallelConfig(**layout), "cpu"), []
    for compile in (False, True):
        model = prepare(SUBJECTS[name], F32)
        parallelize(model, plan(model), mesh, ParallelConfig(**layout), dtype=F32, compile=compile)
        made = step(model, SUBJECTS[name], F32, SAMPLES, mesh)
        results.append((made.loss, {name: grad.numpy() for name, grad in made.grads.items()}))
    return results, count_graphs()


def ranks() -> None:
    reference = step(prepare(SUBJECTS["wan"], F64), SUBJECTS["wan"], F64, SAMPLES)
    for word, layout in (("FSDP", {"dp_shard": 2}), ("Ulysses", {"dp_shard": 1, "ulysses": 2})):
        results, graphs = spawn(2, on_two_ranks, "wan", layout, timeout=500)[0]
        found = [
            Result(loss, {name: torch.from_numpy(grad) for name, grad in grads.items()}) for loss, grads in results
        ]
        judge(f"wan, float32, {word} over two gloo ranks", reference, *found, F32, graphs)


def between() -> None:
    """Forwards without gradients between steps, as validation and samples do, and two numbers of samples."""
    torch._dynamo.reset()
    subject, before = SUBJECTS["wan"], count_graphs()
    models = {dtype: prepare(subject, dtype) for dtype in (F64, F32)}
    compiled = prepare(subject, F32)
    parallelize(compiled, plan(compiled), compile=True)
    inputs, _ = subject.take(subject.batch(), slice(0, 3), torch.ones(3))
    inputs = {name: values.bfloat16().float() for name, values in inputs.items()}
    for turn, samples in enumerate((8, 6, 8, 4, 6)):
        found = [step(model, subject, dtype, samples) for dtype, model in models.items()]
        own = step(compiled, subject, F32, samples)
        judge(f"wan, float32, step {turn} with samples in between", *found, own, F32, count_graphs() - before)
        with torch.no_grad():
            off = compiled.eval()(**inputs) - models[F32].eval()(**inputs)
        assert off.abs().max() < 1e-5, off.abs().max()
        for model in (compiled, models[F32]):
            model.train()


def training() -> None:
    """mm_train over two shapes, ended after three steps of six and continued, by itself and compiled."""
    with tempfile.TemporaryDirectory() as folder:
        features = write_features(Path(folder) / "store")
        more = ("--validation.features", str(features), "--validation.every", "2")
        for name, compile in (("eager", "false"), ("compiled", "true")):
            for steps in ("3", "6"):
                options = arguments(features, Path(folder) / name, *more, "--steps", steps, "--compile", compile)
                subprocess.run([sys.executable, "-m", "mm_train", *options], check=True, capture_output=True)
        eager, own = ([row for row in rows(Path(folder) / name) if "loss" in row] for name in ("eager", "compiled"))
    print(f"losses {', '.join(str(row['loss']) for row in eager)}; compiled graphs of each step", end=" ")
    print(", ".join(str(row.get("compiled_graphs", 0)) for row in own))
    for what in ("loss", "grad_norm"):
        off = [abs(a[what] / b[what] - 1) for a, b in zip(own, eager, strict=True)]
        print(f"compiled {what} is off by {', '.join(f'{x:.0e}' for x in off)}", flush=True)


def of_diffusers() -> None:
    """Whether diffusers' own way of compiling gives the gradients of its eager model."""
    from diffusers import WanTransformer3DModel

    torch._dynamo.reset()
    sizes = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 4, "text_dim": 16, "ffn_dim": 80}
    batch = SUBJECTS["wan"].batch()
    inputs = [batch[name].bfloat16() for name in ("video", "t", "text")]

    def run(model: nn.Module, dtype: torch.dtype) -> Result:
        model.zero_grad()
        video, t, text = inputs
        output = model(video.to(dtype), t.float(), text.to(dtype), return_dict=False)[0]
        loss = (output.double() - batch["target"]).square().mean()
        loss.backward()
        return Result(loss.item(), gradients(model))

    model = filled(WanTransformer3DModel(**sizes)).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().double()
    reference = run(model, F64)
    for dtype in (F32, BF16):
        eager, own = copy.deepcopy(model).to(dtype), copy.deepcopy(model).to(dtype)
        before = count_graphs()
        own.compile_repeated_blocks(fullgraph=True)
        judge(f"diffusers' Wan, {dtype}", reference, run(eager, dtype), run(own, dtype), dtype, count_graphs() - before)


def layers() -> None:
    """Processor time of the first step, compilers and all, less that of the second."""
    for number in (2, 8, 2, 8):
        command = [sys.executable, __file__, "--layers", str(number)]
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            said = subprocess.run(command, check=True, capture_output=True, env=environment).stdout
        print(f"{number} layers: {json.loads(said):.1f} s of processor time to compile", flush=True)


def compile_of(number: int) -> float:
    def processor() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def make() -> nn.Module:
        return filled(build("wan-tiny", dtype=F64, **WAN | {"num_layers": number}))

    subject = Subject(make, plan, videos)
    model = prepare(subject, F32)
    compile_layers(model, plan(model))
    times = [processor()]
    for _ in range(2):
        step(model, subject, F32, SAMPLES)
        times.append(processor())
    return times[1] - times[0] - (times[2] - times[1])


def main(*words: str) -> None:
    for name in dict.fromkeys(name for word in words or [""] for name in CASES if word in name):
        print(f"\n{name}\n" + (f"\n{HEAD}" if name not in ("training", "layers") else ""), flush=True)
        CASES[name]()


CASES: dict[str, Callable[[], Any]] = {
    "families in float32": partial(in_families, F32),
    "families in bfloat16": partial(in_families, BF16),
    "dropout": dropout,
    "frozen base": frozen_base,
    "recompute": recompute,
    "ranks": ranks,
    "between": between,
    "training": training,
    "diffusers": of_diffusers,
    "layers": layers,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--layers"]:
        print(compile_of(int(sys.argv[2])))
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
        main(*sys.argv[1:])

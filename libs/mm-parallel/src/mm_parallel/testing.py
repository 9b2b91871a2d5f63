"""Running a function on several ranks of this machine, and a model to run: for our tests and for those of others."""

import faulthandler
import importlib
import importlib.util
import inspect
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm_parallel.plan import ParallelPlan

# Imported once, in the server from which ranks are forked; _dynamo because the first collective imports it.
_PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
]


def spawn(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """Calls `fn(rank, world, *args)` in `world` new processes, one gloo process group; returns their results by rank.

    `fn` is a top-level function of an importable module or of a test file; arguments and results are pickled. Each rank
    computes on one thread. Raises RuntimeError with the traceback of the rank that failed first (or its exit code, if
    it was killed), and TimeoutError with the stacks of those that still run after `timeout` seconds. The first call
    adds about 4 s, once, to import torch. Either way no process is left.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    # the test file is loaded by path, because pytest's importlib mode gives it a name nobody can import
    function = (fn.__module__, inspect.getfile(fn), fn.__qualname__)
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            call = (theirs, folder, rank, world, function, pickle.dumps(args), timeout)
            process = context.Process(target=_run_rank, args=call, daemon=True)
            process.start()
            theirs.close()  # so that ours ends when the process does
            ranks.append((process, ours))
        try:
            return _collect(ranks, Path(folder), fn.__qualname__, timeout)
        finally:
            for process, ours in ranks:
                process.kill()
                process.join()
                ours.close()


def _collect(ranks: list, folder: Path, name: str, timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    waiting = {ours: rank for rank, (_, ours) in enumerate(ranks)}
    results: dict[int, Any] = {}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            stacks = "\n".join(_stack_of(rank, ranks[rank][0], folder) for rank in waiting.values())
            raise TimeoutError(f"{name}: ranks {sorted(waiting.values())} still run after {timeout} s\n{stacks}")
        failures = []
        for ours in ready:
            rank = waiting.pop(ours)
            try:
                results[rank], failure = ours.recv()
            except EOFError:  # no word: killed, or aborted in C++
                ranks[rank][0].join()
                failure = f"died with exit code {ranks[rank][0].exitcode}"
            if failure:
                failures.append(f"rank {rank} of {len(ranks)} in {name}: {failure}")
        if failures:
            raise RuntimeError("\n".join(failures))
    return [results[rank] for rank in range(len(ranks))]


def _stack_of(rank: int, process: Any, folder: Path) -> str:
    stack = folder / f"stack{rank}"
    if not (stack.exists() and process.is_alive()):
        return f"rank {rank} did not start"
    os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.2)  # faulthandler writes while it handles the signal
    return f"rank {rank}: {stack.read_text()}"


def _run_rank(pipe: Any, folder: str, rank: int, world: int, function: tuple, args: bytes, timeout: float) -> None:
    with open(f"{folder}/stack{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, stack)
        try:
            torch.set_num_threads(1)
            fn = _find(*function)
            store = f"file://{folder}/store"
            deadline = timedelta(seconds=timeout + 60)  # ours comes first: it shows the stacks
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=deadline)
            result = fn(rank, world, *pickle.loads(args))
            dist.barrier()  # a rank that is done must not look like one that died
            pipe.send((result, None))
        except BaseException:  # DCP raises BaseException
            pipe.send((None, traceback.format_exc()))
            pipe.close()
            signal.pause()  # keep our connections open, or other ranks would fail because of us and be reported first
        dist.destroy_process_group()


def _find(module_name: str, path: str, qualname: str) -> Callable[..., Any]:
    if module_name not in sys.modules:
        try:
            importlib.import_module(module_name)
        except ModuleNotFoundError:
            for dot, letter in enumerate(module_name):  # unpickling imports by name, and asks for the parents first
                if letter == ".":
                    sys.modules.setdefault(module_name[:dot], types.ModuleType(module_name[:dot]))
            spec = importlib.util.spec_from_file_location(module_name, path)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    return getattr(sys.modules[module_name], qualname)


class Stream(NamedTuple):
    """What travels up `TinyLadder`: x B L D, and mod B 2 D in fp32."""

    x: Tensor
    mod: Tensor


class TinyLadder(nn.Module):
    """A toy with what real ladders have: islands of each kind, sizes that no world size divides, a compute dtype.

    Called as `model(tokens, t) -> y` with tokens B L 5, t B 3 and y B L 5. A block's `read` are the dtypes of its
    parameters as its last forward found them.
    """

    plan = ParallelPlan(rungs=("blocks.*",), fp32=("time.*", "*.norm.weight", "*.table"))

    def __init__(self, layers: int = 3, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.embed = nn.Linear(5, 7)
        self.time = nn.Sequential(nn.Linear(3, 9), nn.SiLU(), nn.Linear(9, 14))  # an island of matrices: own group
        self.blocks = nn.ModuleList(TinyBlock(7) for _ in range(layers))
        self.out = nn.Linear(7, 5)

    @property
    def layers(self) -> nn.ModuleList:
        return self.blocks

    def stem(self, tokens: Tensor, t: Tensor) -> Stream:
        x = _linear(self.embed, tokens.to(self.compute_dtype or tokens.dtype))
        return Stream(x.to(t.dtype), self.time(t).unflatten(1, (2, 7)))  # the residual stream is an island as well

    def layer(self, i: int, stream: Stream) -> Stream:
        return self.blocks[i](stream, self.compute_dtype)

    def head(self, stream: Stream) -> Tensor:
        return _linear(self.out, stream.x.to(self.compute_dtype or stream.x.dtype)).to(stream.x.dtype)

    def forward(self, tokens: Tensor, t: Tensor) -> Tensor:
        stream = self.stem(tokens, t)
        for i in range(len(self.blocks)):
            stream = self.layer(i, stream)
        return self.head(stream)


class TinyBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)  # an island beside matrices: replicated
        self.norm = nn.LayerNorm(dim, bias=False)
        self.up, self.down = nn.Linear(dim, 11), nn.Linear(11, dim)
        self.read: dict[str, torch.dtype] = {}

    def forward(self, stream: Stream, dtype: torch.dtype | None) -> Stream:
        self.read = {name: p.dtype for name, p in self.named_parameters()}
        shift, gate = (self.table + stream.mod).unbind(1)
        y = self.norm(stream.x) + shift[:, None]
        y = _linear(self.down, torch.nn.functional.gelu(_linear(self.up, y.to(dtype or y.dtype))))
        return stream._replace(x=stream.x + gate[:, None] * y.to(stream.x.dtype))


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's whole gradient by name (all ranks call it). Raises AssertionError where there is none."""
    whole = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        grad = parameter.grad
        whole[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return whole


def assert_same_grads(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float) -> None:
    """Compares gradients by name: |actual - expected| <= rtol |expected| in the 2-norm of each tensor."""
    assert set(actual) == set(expected), f"different names: {sorted(set(actual) ^ set(expected))}"
    for name, want in expected.items():
        error, size = torch.linalg.vector_norm(actual[name] - want).item(), torch.linalg.vector_norm(want).item()
        assert error <= rtol * size, f"gradient of {name}: error {error:.2e} is over {rtol:.0e} of {size:.2e}"

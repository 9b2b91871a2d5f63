"""Running a function on several ranks of this machine."""

import faulthandler
import gc
import importlib
import importlib.machinery
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
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# _dynamo because the first collective imports it.
_ALWAYS = [
    "mm_parallel.testing.ranks",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
]
_MOMENT = 1.0  # seconds after a traceback in which the rank that caused it, by dying, is still heard of
_PATIENCE = 2  # seconds that a rank which died leaves the others to say why
_LOADERS = (importlib.machinery.SourceFileLoader, importlib.machinery.ExtensionFileLoader)


def spawn(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """Calls `fn(rank, world, *args)` in `world` new processes, one gloo process group; returns their results by rank.

    `fn` is a top-level function of an importable module or of a test file; arguments and results are pickled. Each rank
    computes on one thread. Raises RuntimeError with the traceback of the rank that failed first (of one that died
    without a word its exit code, and what another says just after), and TimeoutError with the stacks of those that
    still run after `timeout` seconds. Either way no rank is left. Ranks are forked from a server that imports, at the
    first call, what this process has imported by then: that takes some seconds, and every call a tenth of a second.
    """
    context = multiprocessing.get_context("forkserver")
    # the test file is loaded by path, because pytest's importlib mode gives it a name nobody can import
    function = (fn.__module__, inspect.getfile(fn), fn.__qualname__)
    with tempfile.TemporaryDirectory() as folder:
        preload(context, Path(folder))
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


def preload(context: multiprocessing.context.ForkServerContext, folder: Path) -> None:
    """Has the server of this context, which may be about to start, import what this process has imported by now."""
    context.set_forkserver_preload(["mm_parallel.testing.preload"])
    names = folder / "names"
    names.write_text("\n".join(_ALWAYS + _imported_here()), encoding="utf-8")
    os.environ["MM_PARALLEL_PRELOAD"] = str(names)


def _imported_here() -> list[str]:
    """What this process has imported, for its ranks will want it too; without test files, loaded as pytest does."""
    specs = {name: getattr(module, "__spec__", None) for name, module in list(sys.modules.items())}
    return [name for name, spec in specs.items() if type(getattr(spec, "loader", None)) in _LOADERS]


def _collect(ranks: list, folder: Path, name: str, timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    waiting = {ours: rank for rank, (_, ours) in enumerate(ranks)}
    results: dict[int, Any] = {}
    failures: list[str] = []
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready and failures:
            break
        if not ready:
            stacks = "\n".join(_stack_of(rank, ranks[rank][0], folder) for rank in waiting.values())
            raise TimeoutError(f"{name}: ranks {sorted(waiting.values())} still run after {timeout} s\n{stacks}")
        for ours in ready:
            rank = waiting.pop(ours)
            try:
                results[rank], failure = ours.recv()
                if failure:  # perhaps of another's death, which the system tells a moment later
                    deadline = min(deadline, time.monotonic() + _MOMENT)
            except EOFError:  # no word: killed, or aborted in C++
                ranks[rank][0].join()
                failure = f"died with exit code {ranks[rank][0].exitcode}"
                deadline = min(deadline, time.monotonic() + _PATIENCE)  # another may be about to say why
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
    return f"rank {rank}: {stack.read_text(encoding='utf-8')}"


def _run_rank(pipe: Any, folder: str, rank: int, world: int, function: tuple, args: bytes, timeout: float) -> None:
    gc.freeze()  # what the server imported is nobody's garbage: a collection need not look at it
    with open(f"{folder}/stack{rank}", "w", encoding="utf-8") as stack:
        faulthandler.register(signal.SIGUSR1, stack)
        faulthandler.enable()  # what aborts in C++ shows where Python was
        try:
            torch.set_num_threads(1)
            fn = _find(*function)
            store = f"file://{folder}/store"
            deadline = timedelta(seconds=timeout + 60)  # ours comes first: it shows the stacks
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=deadline)
            result = fn(rank, world, *pickle.loads(args))
            if dist.is_initialized():  # a program that ran here may have left
                dist.barrier()  # a rank that is done must not look like one that died
            pipe.send((result, None))
        except BaseException:  # DCP raises BaseException
            pipe.send((None, traceback.format_exc()))
            pipe.close()
            signal.pause()  # keep our connections open, or other ranks would fail because of us and be reported first
        if dist.is_initialized():
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

"""The one file that knows cpu/gloo, cuda/nccl and npu/hccl. Everything else is handed a torch.device."""

import gc
import importlib
import importlib.util
import os
import re
import resource
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.devices import recognize
from mm_parallel.launch import Launch, read_launch

BACKENDS = ("gloo", "nccl", "hccl")
"""What an error of communication may name."""


def device() -> torch.device:
    """This process's device: the accelerator that torch finds, else the CPU.

    torch_npu is imported where it is installed; it is never a dependency: without CANN it breaks `import torch`.
    """
    _import_torch_npu()
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, torch.accelerator.current_device_index())


def _import_torch_npu() -> None:
    if "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is None:
        return
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError) as error:  # installed, but CANN is not sourced
        warnings.warn(f"torch_npu is installed but cannot be imported, so no NPU is used: {error}", stacklevel=3)


def backend(device: torch.device) -> str:
    """The process group backends for tensors of `device`; next to an accelerator's own there is always gloo, which
    object collectives, offloading and asynchronous checkpoints use for CPU tensors."""
    own = dist.get_default_backend_for_device(device.type)
    return own if device.type == "cpu" else f"cpu:gloo,{device.type}:{own}"


def init_distributed(
    timeout: timedelta = timedelta(minutes=10),
    store: dist.Store | None = None,
) -> tuple[int, int, int]:
    """Joins the process group that torchrun describes in the environment; returns (rank, world, local rank).

    Without torchrun there is no process group and the answer is (0, 1, 0). Each process takes the accelerator of its
    local rank. store: where the ranks meet, if they have met. Raises ValueError when this host has fewer accelerators
    than local ranks, and as `read_launch` does.
    """
    if dist.is_initialized():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        launch = Launch(dist.get_rank(), dist.get_world_size(), local, joins=True)
    else:
        launch = read_launch()
    if launch.ranks is None:
        return 0, 1, 0
    rank, world = launch.ranks
    local = launch.local or 0
    here = device()
    if here.type != "cpu":
        count = torch.accelerator.device_count()
        if launch.local is None and world > 1 and count > 1:
            raise ValueError(
                f"the environment says RANK={rank}, but not LOCAL_RANK, and this host shows {count} of type "
                f"{here.type}: start with torchrun, which says which of them is whose"
            )
        if local >= count:
            raise ValueError(
                f"local rank {local} needs its own device, but this host shows {count} of type {here.type}: "
                f"start at most {count} processes per host (torchrun --nproc_per_node {count})"
            )
        torch.accelerator.set_device_index(local)
    if not dist.is_initialized():
        met = {} if store is None else {"store": store, "rank": rank, "world_size": world}
        dist.init_process_group(backend(here), timeout=timeout, **met)
    return rank, world, local


def leave() -> None:
    """Leaves the process group, at the end of a program that went well; without one it does nothing.

    A program that just ends may abort in the threads of gloo: one that lets go of its last tensor while the interpreter
    shuts down is ended in the middle of C++. Meshes keep their groups, and so those threads, alive; here both go.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        for mesh in [each for each in gc.get_objects() if type(each) is DeviceMesh]:
            getattr(mesh, "_pg_registry", {}).clear()


def bf16_ok(device: torch.device) -> bool:
    """Whether bf16 arithmetic is native there (a CPU always can, slowly)."""
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    if supported is None:
        return True
    return supported(including_emulation=False) if device.type == "cuda" else supported()


def name_of(device: torch.device) -> str:
    """The marketing name of a device; "the CPU" for that."""
    return "the CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def max_device_memory(device: torch.device) -> int | None:
    """Bytes of memory that the device has; None for a CPU, and where torch cannot say it."""
    if device.type == "cpu":
        return None
    told = getattr(torch.get_device_module(device), "get_device_properties", None)
    return None if told is None else told(device).total_memory


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of one device in FLOP/s, or None where we know no public figure (then no MFU is printed)."""
    if device.type == "cpu":
        return None
    return peak_flops_of(name_of(device), dtype)


def peak_flops_of(device_name: str, dtype: torch.dtype) -> float | None:
    """The same by the device's marketing name, as `nvidia-smi -L` or `npu-smi info` print it."""
    known = recognize(device_name)
    return None if known is None else known.peak.get(str(dtype).removeprefix("torch."))


def synchronize(device: torch.device) -> None:
    """Waits for the work queued on the device; returns at once on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def memory_allocated(device: torch.device) -> int:
    """Bytes that tensors hold on the device now; on a CPU the resident memory of this process."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    if sys.platform != "linux":
        return max_memory(device)
    with open("/proc/self/statm", encoding="utf-8") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def max_memory(device: torch.device) -> int:
    """Largest number of bytes held by tensors since `reset_max_memory`; on a CPU the peak resident memory of this
    process since its start."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    if sys.platform == "linux":  # whose ru_maxrss has that of the process that started this one, too
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_max_memory(device: torch.device) -> None:
    """Starts a new peak; a CPU process keeps its own."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)

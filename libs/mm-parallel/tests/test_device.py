import re
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mm_parallel import device as devices
from mm_parallel.launch import Launch, read_launch

CPU = torch.device("cpu")


def test_without_an_accelerator_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert devices.device() == CPU
    assert devices.backend(CPU) == "gloo"


def test_an_accelerator_gets_gloo_beside_its_own_backend():
    assert devices.backend(torch.device("cuda")) == "cpu:gloo,cuda:nccl"


def test_torch_npu_without_cann_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(UserWarning, match=r"torch_npu is installed but cannot be imported.*libhccl"):
        devices.device()


def test_without_torchrun_there_is_no_process_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert devices.init_distributed() == (0, 1, 0)
    assert not dist.is_initialized()


def test_torchrun_is_joined():
    code = (
        "from mm_parallel.device import init_distributed; import torch.distributed as dist\n"
        "print(init_distributed(), dist.get_backend(), dist.get_world_size())"
    )
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.split("\n")[0] == "(0, 1, 0) gloo 1", run.stderr


def test_more_local_ranks_than_devices_is_refused(monkeypatch):
    torchrun = {"RANK": "9", "WORLD_SIZE": "16", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for key, value in torchrun.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("LOCAL_RANK", "9")
    monkeypatch.setattr(devices, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    with pytest.raises(ValueError, match=r"local rank 9 .* shows 8 .*--nproc_per_node 8"):
        devices.init_distributed(timedelta(seconds=5))
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match=r"RANK=9, but not LOCAL_RANK, and this host shows 8"):
        devices.init_distributed(timedelta(seconds=5))


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        (TORCHRUN, Launch(1, 2, 1, True)),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": ""}, Launch(0, 1, None, True)),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "1"}, Launch()),  # of a pod
        ({"MASTER_ADDR": "node1", "LOCAL_RANK": "3", **SLURM}, Launch()),
        ({"RANK": "0"}, Launch()),
        ({"WORLD_SIZE": "1"}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "node1"}, Launch()),
        ({"RANK": "", "WORLD_SIZE": " "}, Launch()),
        ({"RANK": "1"}, "says RANK=1, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: torchrun"),
        ({"WORLD_SIZE": "8"}, "says WORLD_SIZE=8, but not RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "says RANK=0, WORLD_SIZE=2, but not MASTER_ADDR, MASTER_PORT"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "but not MASTER_PORT"),
        ({**TORCHRUN, "RANK": "2"}, "RANK=2 and WORLD_SIZE=2: ranks are 0 to 1"),
        ({**TORCHRUN, "RANK": "x"}, "RANK='x'; it takes a whole number"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE='0'; it takes a whole number (at least 1)"),
        ({**TORCHRUN, "MASTER_PORT": "-1"}, "MASTER_PORT='-1'"),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, "MASTER_PORT=65536: ports are 0 to 65535"),
        ({**TORCHRUN, "LOCAL_RANK": "a"}, "LOCAL_RANK='a'"),
    ],
)
def test_what_a_launcher_says(environment, expected):
    if isinstance(expected, Launch):
        assert read_launch(environment) == expected
    else:
        with pytest.raises(ValueError, match=re.escape(expected)):
            read_launch(environment)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.float16, 756e12),
        ("NVIDIA H200", torch.float32, 67e12),
        ("Ascend910B3", torch.bfloat16, 313e12),
        ("Ascend910B3", torch.float32, None),
        ("NVIDIA T4", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-80GB", torch.int8, None),
    ],
)
def test_peak_by_name(name, dtype, peak):
    assert devices.peak_flops_of(name, dtype) == peak


def test_a_cpu_has_no_peak_but_has_memory():
    assert devices.peak_flops(CPU, torch.float32) is None
    before = devices.memory_allocated(CPU)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert devices.memory_allocated(CPU) - before > len(block) / 2
    assert devices.max_memory(CPU) >= devices.memory_allocated(CPU) - (1 << 20)
    assert devices.bf16_ok(CPU)
    devices.synchronize(CPU)
    devices.reset_max_memory(CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_memory_of_a_process_has_none_of_that_which_started_it():
    code = "from mm_parallel import device; print(device.max_memory(device.torch.device('cpu')))"
    block = torch.ones(1 << 30, dtype=torch.uint8)
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(started.stdout) < len(block) / 2

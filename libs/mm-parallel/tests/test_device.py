import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mm_parallel import device as devices

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
    for key, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "9"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(devices, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    with pytest.raises(ValueError, match=r"local rank 9 .* shows 8 .*--nproc_per_node 8"):
        devices.init_distributed(timedelta(seconds=5))


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

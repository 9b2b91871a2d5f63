"""The table of devices: it is whole, a user's own file is read like it, and what is wrong in one is said."""

import re

import pytest

from mm_parallel.attention.backends import BACKENDS
from mm_parallel.devices import find_device, read_devices, recognize


def test_the_table_is_whole():
    devices = read_devices()
    assert {"a100-80g", "a100-40g", "h100", "h200", "b200", "l40s", "rtx-4090", "ascend-910b3"} <= set(devices)
    for name, device in devices.items():
        assert device.peak_of("bfloat16") > 1e14, name
        assert 16 * 2**30 < device.memory < 512 * 2**30, name
        assert device.network <= device.link < device.bandwidth, name
        assert set(device.shares.attention) <= set(BACKENDS), name
        assert (device.kind == "cuda") == (device.capability > (0, 0)), name
        assert {"flash", "npu"} & set(device.shares.attention), name


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Ascend910B4-1", "ascend-910b4"),
    ],
)
def test_a_device_is_known_by_what_it_says(said, name):
    assert recognize(said).name == name


def test_a_device_that_nobody_knows():
    assert recognize("NVIDIA T4") is None
    with pytest.raises(ValueError, match=r"no device is named 'h1000', do you mean h100\?: there are a100-40g, "):
        find_device("h1000")
    with pytest.raises(ValueError, match=r"'910B', do you mean ascend-910b2 or ascend-910b3 or ascend-910b4\?"):
        find_device("910B")
    assert find_device("RTX 4090") == find_device("rtx4090") == find_device("rtx-4090")


OWN = """
[h100]
names = ["H100"]
kind = "cuda"
capability = [9, 0]
kernels = "mine"
memory = 70
bandwidth = 3e12
link = 4e11
network = 1e10
host_link = 6e10
per_host = 4
host_memory = 100
peak = { bfloat16 = 9e14 }
[kernels.mine]
gemm = 0.5
memory = 0.8
collective = 0.7
launch = 1e-6
attention = { flash = [0.3, 0.2] }
"""


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "devices.toml"
    file.write_text(OWN, encoding="utf-8")
    mine = find_device("H100", file)
    assert (mine.per_host, mine.memory, mine.shares.gemm) == (4, 70 * 2**30, 0.5)
    assert find_device("h200", file) == find_device("h200")
    with pytest.raises(ValueError, match=r"no peak of h100 in float32 is known \(bfloat16 is\)"):
        mine.peak_of("float32")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('kernels = "mine"', 'kernels = "hoper"', "device h100: kernels='hoper', but there are hopper, h20,"),
        ("memory = 70\n", "", "device h100: memory missing"),
        ("memory = 70", "memory = 70\nmemery = 7", "device h100: memery unknown"),
        ("link = 4e11", "link = 0", "device h100: link=0 must be above 0, and a number"),
        ("memory = 70", 'memory = "70"', "device h100: memory='70' must be above 0, and a number"),
        ('names = ["H100"]', 'names = "H100"', "device h100: names must be a list"),
        ("[h100]", "fast = 1\n[h100]", "device fast: 1 is no table"),
        ("gemm = 0.5", 'gemm = "0.5"', "kernels.mine: gemm=0.5: shares are above 0"),
        ("gemm = 0.5", "gemm = 65", "kernels.mine: gemm=65: shares are above 0 and at most 1"),
        ("gemm = 0.5\n", "", "kernels.mine: has memory, collective, launch, attention, but needs attention,"),
        ("[h100]", "[h100", "is no table of devices"),
    ],
)
def test_what_is_wrong_in_it(tmp_path, old, new, said):
    file = tmp_path / "devices.toml"
    file.write_text(OWN.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(said)):
        read_devices(file)

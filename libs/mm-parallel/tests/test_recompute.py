import copy

import pytest
import torch

from mm_parallel import MemoryConfig, parallelize
from mm_parallel.testing import TinyLadder


@pytest.mark.parametrize(("rungs", "runs"), [("none", [1, 1, 1]), (0, [1, 1, 1]), (2, [2, 2, 1]), ("full", [2, 2, 2])])
def test_rungs_run_again_in_the_backward(rungs, runs):
    model = TinyLadder()
    counted = [0, 0, 0]
    for i, block in enumerate(model.blocks):
        block.norm.register_forward_pre_hook(lambda *_, i=i: counted.__setitem__(i, counted[i] + 1))
    parallelize(model, TinyLadder.plan, memory=MemoryConfig(rungs))
    model(torch.randn(2, 4, 5), torch.randn(2, 3)).sum().backward()
    assert counted == runs


@pytest.mark.parametrize("wrong", [4, -1, "some", 1.5])
def test_impossible_recompute_is_refused(wrong):
    with pytest.raises(ValueError, match=r'"none", "full", or how many of the 3 rungs'):
        parallelize(TinyLadder(), TinyLadder.plan, memory=MemoryConfig(wrong))


def test_a_copy_recomputes_with_its_own_weights():
    model = parallelize(TinyLadder(), TinyLadder.plan, memory=MemoryConfig("full"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].table.zero_()
        twin.blocks[0].up.weight.zero_()
    inputs = torch.randn(2, 4, 5), torch.randn(2, 3)
    assert not torch.allclose(model(*inputs), twin(*inputs))

"""What a layout cannot do with a model is told without a process group, in the words of those who cut."""

import pytest
import torch

from mm_parallel import MemoryConfig, ParallelConfig, Pipeline, make_mesh, parallelize
from mm_parallel.fits import check_fits, find_idle
from mm_parallel.mesh import size
from mm_parallel.testing import TinyLadder, spawn

NONE = MemoryConfig()
WRONG = [
    (ParallelConfig(pp_layers=(1, 99)), NONE),
    (ParallelConfig(pp_layers=(2, 1), schedule="zero_bubble"), MemoryConfig("full")),
    (ParallelConfig(dp_shard=2), MemoryConfig(recompute=1000)),
    (ParallelConfig(dp_shard=2), MemoryConfig(recompute=("full",))),
    (ParallelConfig(ulysses=2), MemoryConfig(offload="attention")),
    (ParallelConfig(tp=2), MemoryConfig(offload="inputs")),
    (ParallelConfig(tp=2), MemoryConfig(offload_params=True)),
]
RIGHT = [
    (ParallelConfig(), MemoryConfig("full", offload="inputs")),
    (ParallelConfig(ulysses=2), MemoryConfig("but_attention", offload="attention")),
    (ParallelConfig(tp=2), MemoryConfig(recompute=1, but_attention=2)),
    (ParallelConfig(pp_layers=(2, 1)), NONE),
]


def refuse(work) -> str:
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


def cut(parallel: ParallelConfig, memory: MemoryConfig) -> None:
    model, mesh = TinyLadder(), make_mesh(parallel, "cpu")
    how = (TinyLadder.plan, mesh, parallel, memory)
    Pipeline(model, *how) if size(mesh, "pp") > 1 else parallelize(model, *how)


def really(rank: int, world: int) -> list[str]:
    return [refuse(lambda case=case: cut(*case)) for case in WRONG + RIGHT]


def asked(parallel: ParallelConfig, memory: MemoryConfig) -> str:
    with torch.device("meta"):
        model = TinyLadder()
    return refuse(lambda: check_fits(model, TinyLadder.plan, parallel.resolve(2), memory))


def test_it_is_refused_as_it_would_be():
    told = [asked(*case) for case in WRONG + RIGHT]
    assert all(told[: len(WRONG)])
    assert not any(told[len(WRONG) :])
    for said in spawn(2, really):
        assert [text.partition("(2 ranks")[0] for text in said] == [text.partition("(dp_rep")[0] for text in told]


def test_what_tp_cannot_share_is_refused():
    with pytest.raises(ValueError, match="cannot be cut over tp=3: for this model tp can be"):
        check_fits(TinyLadder(), TinyLadder.plan, ParallelConfig(tp=3).resolve(3), NONE)


def test_stages_without_anything_trained_are_named():
    layout = ParallelConfig(pp_layers=((1, 1), (1, 1))).resolve(2)
    model = TinyLadder(layers=4).requires_grad_(False)
    assert find_idle(model, TinyLadder.plan, layout, NONE) == [0, 1]
    model.blocks[2].requires_grad_(True)
    assert find_idle(model, TinyLadder.plan, layout, NONE) == [1]
    model.out.requires_grad_(True)
    assert find_idle(model, TinyLadder.plan, layout, NONE) == []

"""What the documents on parallelism show is what there is."""

import importlib.util
from pathlib import Path

import pytest

from mm_parallel import MemoryConfig, ParallelConfig
from mm_parallel.testing import spawn
from mm_train import guides

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_table_of_mindspeed_mms_names_is_the_one_that_is_used():
    assert guides.table().strip() in (DOCS / "guides.md").read_text(encoding="utf-8")


def llama(parallel: ParallelConfig, memory: MemoryConfig) -> list[float]:
    spec = importlib.util.spec_from_file_location("cut_llama", DOCS / "examples/cut_llama.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train(parallel, memory)


LAYOUTS = [
    (ParallelConfig(), MemoryConfig()),
    (ParallelConfig(ulysses=2, ring=2), MemoryConfig("but_attention")),
    (ParallelConfig(tp=2, ring=2), MemoryConfig("full")),
    (ParallelConfig(pp_layers=(1, 3), ulysses=2), MemoryConfig("full", offload="inputs")),
    (ParallelConfig(pp_layers=((1, 1), (1, 1)), dp_replicate=2), MemoryConfig()),
]


def in_every_layout(rank: int, world: int) -> list[list[float]]:
    return [llama(*layout) for layout in LAYOUTS]


def test_a_model_that_is_not_ours_trains_alike_in_every_layout():
    """transformers' Llama: causal, grouped heads, a plan and a ladder written outside."""
    alone = llama(ParallelConfig(), MemoryConfig())
    for losses in spawn(4, in_every_layout, timeout=180):
        for layout in losses:
            assert layout == pytest.approx(alone, rel=1e-10)

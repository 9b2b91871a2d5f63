"""What the documents show is what there is."""

import importlib.util
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm_data import FeatureCache
from mm_models import families
from mm_parallel import MemoryConfig, ParallelConfig
from mm_parallel.testing import spawn
from mm_parallel.testing.equivalence import FEATURES, SAMPLES, Case, Subject, check, combine
from mm_train import guides
from mm_train.recipe import load_config
from mm_train.train import train

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*DOCS.rglob("*.md"), *(page for place in (".", "libs/*", "apps/*") for page in ROOT.glob(f"{place}/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_links_to_what_is_there(page):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s#]+)", prose)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_promises_name_tests_that_are_there(page):
    """A name without a folder is in the folder before it."""
    folder, tests = ROOT, []
    for test in re.findall(r"`((?:[\w-]+/)*test_\w+\.py)`", (ROOT / page).read_text(encoding="utf-8")):
        folder = (ROOT / test).parent if "/" in test else folder
        tests.append(folder / Path(test).name)
    assert len(tests) > 30
    assert [test for test in tests if not test.exists()] == []


def test_the_tree_of_the_readme_is_the_one_that_is_there():
    """Every folder and file that it draws, in both languages alike."""
    drawn = []
    for page in ("README.md", "README.zh.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        tree = next(block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if block.startswith("libs/"))
        drawn.append([(len(line) - len(line.lstrip()), line.split()[0]) for line in tree.splitlines()])
    assert drawn[0] == drawn[1]
    above: list[tuple[int, Path]] = [(-1, ROOT)]
    for indent, name in drawn[0]:
        above = [(depth, path) for depth, path in above if depth < indent]
        (found, *_) = [*above[-1][1].glob(name.replace("…", "src/*")), None]
        assert found, name
        above.append((indent, found))


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


@cache
def small_family() -> dict[str, Any]:
    """The names that the code of adding-a-model.md makes, run from top to bottom."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "adding-a-model.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "adding_a_model"}
    exec(compile("\n".join(blocks), "adding-a-model.md", "exec"), names)
    return names


def build() -> nn.Module:
    page = small_family()
    model = page["TINY"].build(page["TinyConfig"]()).double()
    for name, parameter in model.named_parameters():
        parameter.data = page["initial"](name, parameter.shape, seed=0).double()
    return model


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"video": (4, 3, 3, 1), "text": (5, 16), "target": (4, 3, 3, 1)}  # 9 tokens: no number of ranks fits
    drawn = {n: torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}
    return drawn | {"t": torch.linspace(3, 999, SAMPLES, dtype=torch.float64)}


def in_layouts_of_two(rank: int, world: int, cases: list[Case]) -> None:
    check(rank, world, Subject(build, small_family()["plan"], batch), cases)


def test_the_family_that_is_added_trains_samples_and_is_cut():
    """Each feature that two ranks can have."""
    page = small_family()
    assert page["losses"].shape == (2,)
    assert page["latents"].isfinite().all()
    assert all(parameter.grad is not None for parameter in page["model"].parameters())
    tokens, flops = page["TINY"].cost(page["model"])(page["tensors"])
    assert tokens == 2 * 3 * 8 * 8
    assert flops == pytest.approx(6 * tokens * sum(p.numel() for p in page["model"].blocks.parameters()))
    assert page["TINY"].describe(page["config"])["dim"] == 24
    starts = [page["initial"](name, (8,), seed=0) for name, p in page["model"].named_parameters() if p.ndim == 2]
    assert len({tuple(start.tolist()) for start in starts}) == len(starts) > 20
    cases = [case for name in FEATURES if (case := combine((name,))) and case.ranks == 2]
    assert len(cases) > 5
    spawn(2, in_layouts_of_two, cases, timeout=180)


def test_the_family_that_is_added_computes_in_the_dtype_that_is_asked_for():
    """Masters in float32, matrix products in bfloat16; time and the residual stream stay wide."""
    model = build().float()
    model.compute_dtype = torch.bfloat16
    taken: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: taken.update({name: inputs[0].dtype}))
    inputs = {name: tensor.float() for name, tensor in batch().items() if name != "target"}
    assert model(**inputs).dtype == torch.float32
    assert model.layer(0, model.stem(**inputs)).x.dtype == torch.float32
    assert taken.pop("time") == torch.float32
    assert "blocks.0.q" in taken
    assert set(taken.values()) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_family_that_is_added_is_trained_and_found_by_the_apps(tmp_path, monkeypatch):
    """With its row in the tuple: training with validation, tokens and operations; published numbers for inference.

    It ends where the page's last step is missing: mm-convert has no table of its names, and says so.
    """
    page = small_family()
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, page["TINY"]))
    draw = torch.Generator().manual_seed(0)
    with FeatureCache(tmp_path / "features") as cache:
        for i in range(4):
            sample = {"latents": torch.randn(4, 2, 4, 4, generator=draw), "text.0": torch.randn(3, 16, generator=draw)}
            cache.put(f"{i:064d}", sample, {"id": f"{i}.mp4"})
        cache.finish()
    flags = ["--model", "tiny-t2v", "--weights", "random", "--dtype", "float32", "--steps", "24", "--optim.lr", "3e-3"]
    flags += ["--data.features", str(tmp_path / "features"), "--data.global_batch", "4", "--data.workers", "0"]
    flags += ["--validation.features", str(tmp_path / "features"), "--output", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="belongs to no known family"):
        train(load_config(flags))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    errors = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert errors[-1] < errors[0]
    assert all(row["tokens_per_second"] > 0 for row in rows if "loss" in row)
    assert (tmp_path / "run/checkpoints/step-00000024/.metadata").exists()
    assert families.published_like(page["TinyConfig"](), experts=False) is page["PRESETS"]["tiny-t2v"]
    plain = replace(page["TINY"], objective_options={"shift": 3.0})
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES[:-1], plain))
    with pytest.raises(
        ValueError, match=r"--objective\.weighting bsmntw: tiny-t2v .*; its options: --objective\.shift$"
    ):
        train(load_config([*flags, "--objective.weighting", "bsmntw"]))

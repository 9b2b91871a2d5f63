"""Every optimizer by name: its formula, its layouts, its bytes, and runs that go on from its checkpoints."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate

from mm_convert import open_checkpoint
from mm_models import build, plan
from mm_parallel.testing import spawn
from mm_train.adamw8bit import _levels, _nearest
from mm_train.checkpoint import Checkpointer
from mm_train.checks import check
from mm_train.config import OptimConfig
from mm_train.optim import EMA, build_optimizer, evaluated, find_matrices, learning_rate, parts_of
from mm_train.optimizers import KINDS, check_optimizer, state_bytes
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import SMALL, config, losses, state, write_features

MATRICES = frozenset({"2.weight", "4.weight"})
RATES = {"adafactor": 0.1, "prodigy": 1.0, "adamw8bit": 1e-2}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features") / "store")


def net() -> nn.Sequential:
    """Of odd sizes, so that ranks hold unequal parts, and blocks end within a row."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 256), nn.LayerNorm(256), nn.Linear(256, 13))


def settings(name: str, **more) -> OptimConfig:
    return OptimConfig(name=name, lr=RATES.get(name, 1e-2), **more)


def walk(model: nn.Module, optimizer, steps: range, part: slice = slice(None)) -> None:
    for step in steps:
        inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(step))
        (model(inputs[part]) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_is_gone_on_from_to_the_bit(tmp_path, name):
    """And the states have the bytes that an estimate says."""
    straight = net()
    optimizer = build_optimizer(straight, settings(name), matrices=MATRICES)
    walk(straight, optimizer, range(4))
    named = {p: n for n, p in straight.named_parameters()}
    count = state_bytes(name, MATRICES)
    for p, held in optimizer.state.items():
        tensors = [x for x in held.values() if isinstance(x, torch.Tensor)]
        assert sum(x.numel() * x.element_size() for x in tensors) == count(named[p], tuple(p.shape))

    first = net()
    optimizer = build_optimizer(first, settings(name), matrices=MATRICES)
    walk(first, optimizer, range(2))
    saver = Checkpointer(tmp_path, 0)
    saver.save(2, first, optimizer, EMA(first, 0), {"step": 2, "cursor": 0, "dataset": ""}, "")
    saver.wait()
    walk(first, optimizer, range(2, 4))
    second = net()
    for parameter in second.parameters():
        parameter.data.zero_()
    optimizer = build_optimizer(second, settings(name, weight_decay=0.01), matrices=MATRICES)
    Checkpointer(tmp_path, 0).load(tmp_path / "step-00000002", second, optimizer, EMA(second, 0))
    walk(second, optimizer, range(2, 4))
    assert equal(first, straight)
    assert equal(second, straight)
    assert not equal(net(), straight)


ALL = ("fsdp", "columns", "rows")
CUT = {"adamw": ("fsdp",), "muon": ALL, "adamw8bit": ALL, "schedulefree": ("fsdp",)}


def ranks_walk(rank: int, world: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    for name, ways in CUT.items():
        for how in ways:
            model, part = net(), slice(None)
            if how == "fsdp":
                fully_shard(model, mesh=mesh)
                part = slice(rank * 32, rank * 32 + 32)
            elif how == "columns":
                parallelize_module(model, mesh, {"2": ColwiseParallel(output_layouts=Replicate())})
            else:
                parallelize_module(model, mesh, {"4": RowwiseParallel(input_layouts=Replicate())})
            walk(model, build_optimizer(model, settings(name), matrices=MATRICES), range(2), part)
            whole = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
            if rank == 0:
                torch.save(whole, f"{folder}/{name}.{how}")


def test_parameters_that_are_cut_are_updated_as_whole_ones(tmp_path):
    """By rows (FSDP, columns of tensor parallelism) and by columns; but for rounding.

    Muon rounds to bfloat16, where small directions grow most: up to 0.17 here. Each part by itself would be 0.4 away:
    two halves have twice the norm.
    """
    spawn(2, ranks_walk, str(tmp_path), timeout=120)
    assert CUT.keys() == {name for name, kind in KINDS.items() if not kind.alone}
    for name, ways in CUT.items():
        one, start = net(), dict(net().named_parameters())
        walk(one, build_optimizer(one, settings(name), matrices=MATRICES), range(2))
        for how in ways:
            found = torch.load(tmp_path / f"{name}.{how}", weights_only=True)
            for key, value in one.named_parameters():
                moved = (value - start[key]).norm()
                assert (found[key] - value).norm() < (0.3 if name == "muon" else 1e-3) * moved, (name, how, key)


def test_muon_takes_the_matrices_of_layers_and_adamw_all_else():
    model = build("wan-tiny", device="meta", **SMALL)
    matrices = find_matrices(model, plan(model))
    assert {"blocks.0.self_attn.q.weight", "blocks.1.ffn.2.weight"} <= matrices
    assert all(name.startswith("blocks.") and name.endswith("weight") and "norm" not in name for name in matrices)
    muon, adamw = parts_of(build_optimizer(model, OptimConfig(name="muon"), matrices=matrices))
    assert (type(muon), type(adamw)) == (torch.optim.Muon, torch.optim.AdamW)
    counts = [sum(len(group["params"]) for group in part.param_groups) for part in (muon, adamw)]
    assert counts == [len(matrices), len(list(model.parameters())) - len(matrices)]


def test_a_muon_update_is_orthogonal_and_as_large_as_one_of_adamw():
    model = nn.Linear(32, 16, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, settings("muon", weight_decay=0.0), matrices={"weight"})
    model(torch.randn(8, 32, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    optimizer.step()
    update = (model.weight.detach() - before) / 1e-2
    values = torch.linalg.svdvals(update)[:8] / (0.2 * 32**0.5)  # 8 rows of inputs: as many directions
    assert ((values > 0.5) & (values < 1.3)).all()  # as far as its five iterations go


def test_moments_of_8_bits_follow_those_of_32():
    """Over 200 steps; and a level is never further than half the distance to the next."""
    ends = []
    for name in ("adamw", "adamw8bit"):
        model = net()
        walk(model, build_optimizer(model, OptimConfig(name=name, lr=1e-3), matrices=()), range(200))
        ends.append(torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), net().parameters(), strict=True)]))
    assert torch.nn.functional.cosine_similarity(*ends, dim=0) > 0.98
    levels = _levels(torch.device("cpu"), True)
    assert (levels[0] + levels[-1] - 0.0036).abs() < 1e-2
    values = torch.linspace(-0.98, 1, 5001)
    found = levels[_nearest(values, True).int()]
    assert (found - values).abs().max() <= (levels[1:] - levels[:-1]).max() / 2 + 1e-6


def test_schedule_free_is_evaluated_with_its_average_and_goes_on_where_it_was():
    """Against its package: its warm-up, its train() and eval()."""
    import schedulefree

    ours, theirs = net(), net()
    chosen = settings("schedulefree", warmup=2, weight_decay=0.0)
    optimizer = build_optimizer(ours, chosen)
    reference = schedulefree.AdamWScheduleFree(theirs.parameters(), lr=1e-2, warmup_steps=2)
    reference.train()
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 4, chosen)
        walk(ours, optimizer, range(step, step + 1))
        walk(theirs, reference, range(step, step + 1))
    assert equal(ours, theirs)
    before = [p.detach().clone() for p in ours.parameters()]
    reference.eval()
    with evaluated(ours, optimizer):
        assert equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True))
    walk(ours, optimizer, range(1))  # it is training


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("adafactor", "--optim.betas", "[0.9, 0.95]"),
            "--optim.betas (0.9, 0.95) (perhaps of the model's recipe)",
        ),
        (("adamw", "--optim.momentum", "0.9"), "is for muon, and --optim.name is adamw"),
        (("adamw8bit", "--optim.kernel", "foreach"), "is for adamw and muon, and --optim.name is adamw8bit"),
        (("schedulefree", "--optim.ema", "0.9"), "--optim.name is schedulefree: leave it out"),
        (("schedulefree", "--optim.schedule", "cosine"), "--optim.schedule cosine"),
        (("prodigy", "--optim.rates", '{"head.*": 1}'), "--optim.rates"),
        (("prodigy",), "--optim.lr 0.01 (perhaps of the model's recipe) with --optim.name prodigy"),
        (("sgd",), "adamw8bit"),
    ],
)
def test_options_of_another_optimizer_are_refused(features, tmp_path, flags, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as stop:
        check(config(features, tmp_path / "run", "--optim.name", *flags))
    said = capsys.readouterr().err if stop.value.args == (2,) else str(stop.value)
    assert message in said


def test_a_layout_or_a_package_that_is_not_there_is_said(monkeypatch):
    for name in ("adafactor", "prodigy"):
        with pytest.raises(ValueError, match=f"--optim.name {name} works on one rank, and there are 2: .*adamw8bit"):
            check_optimizer(settings(name), 2)
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ValueError, match="needs the package schedulefree: pip install schedulefree"):
        check_optimizer(settings("schedulefree"), 2)


@pytest.mark.parametrize("name", ["muon", "schedulefree"])
def test_a_run_that_is_validated_goes_on_and_is_exported(features, tmp_path, name):
    flags = ("--optim.name", name, "--steps", "3")
    looked = ("--validation.features", str(features), "--validation.max_samples", "2", "--validation.every", "1")
    train(config(features, tmp_path / "straight", *flags))
    train(config(features, tmp_path / "halves", *flags, *looked, "--steps", "2"))
    with pytest.raises(ValueError, match=rf"optim\.name {name}, this command says adamw"):
        train(config(features, tmp_path / "halves", *flags, "--optim.name", "adamw"))
    weights = train(config(features, tmp_path / "halves", *flags, *looked, "--checkpoint.every", "1"))
    a, b = (state(tmp_path / run / "checkpoints/step-00000003") for run in ("straight", "halves"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert losses(tmp_path / "straight") == losses(tmp_path / "halves")
    exported = open_checkpoint(weights)
    key = "blocks.0.ffn.0.weight"
    assert torch.equal(exported[key], a[f"model.{key}"])
    if name == "schedulefree":
        beta, moved = 0.9, a[f"optimizer.state.{key}.z"]
        expected = a[f"trained_at.{key}"].lerp(moved, 1 - 1 / beta)
        assert torch.equal(exported[key], expected)
        assert not torch.equal(exported[key], a[f"trained_at.{key}"])

"""Whole tensors in and out, and DCP across world sizes."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm_parallel import ParallelConfig, finish_gradients, full_tensors, load_parameters, make_mesh, parallelize
from mm_parallel.testing import TinyLadder, spawn

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> TinyLadder:
    torch.manual_seed(seed)
    return TinyLadder()


class Lazy(Mapping):
    """Knows shapes at once and counts the rows that are read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.rows = tensors, dict.fromkeys(tensors, 0)

    def __getitem__(self, name: str) -> "Rows":
        return Rows(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Rows:
    def __init__(self, source: Lazy, name: str) -> None:
        self.source, self.name, self.shape = source, name, source.tensors[name].shape

    def __getitem__(self, rows) -> Tensor:
        part = self.source.tensors[self.name][rows]
        self.source.rows[self.name] += len(part)
        return part


def from_meta(rank: int, world: int, replicate: int) -> dict[str, int]:
    whole = {name: tensor.double() for name, tensor in seeded().state_dict().items()}
    source = Lazy(whole)
    with torch.device("meta"):
        model = TinyLadder()
    mesh = make_mesh(ParallelConfig(replicate), "cpu")
    parallelize(model, TinyLadder.plan, mesh, dtype=torch.bfloat16)
    assert all(p.is_meta for p in model.parameters())
    load_parameters(model, source, CPU)
    reference = parallelize(
        seeded(), TinyLadder.plan, make_mesh(ParallelConfig(replicate), "cpu"), dtype=torch.bfloat16
    )
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert type(ours) is type(theirs)
        assert ours.dtype == torch.float32
        local = (ours.to_local(), theirs.to_local()) if isinstance(ours, DTensor) else (ours, theirs)
        assert torch.equal(*local), name
    inputs = torch.randn(2, 4, 5), torch.randn(2, 3)
    out = model(*inputs)
    assert torch.equal(out, reference(*inputs))
    out.sum().backward()
    finish_gradients(model, mesh)
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(model(*inputs), out)
    return source.rows


def test_a_meta_model_is_filled_and_each_rank_reads_its_rows_only():
    rows = spawn(4, from_meta, 1)
    assert [rank["out.weight"] for rank in rows] == [2, 2, 1, 0]  # 5 rows on 4 ranks
    assert [rank["time.0.weight"] for rank in rows] == [3, 3, 3, 0]  # 9 rows: the last rank holds none
    assert [rank["blocks.0.norm.weight"] for rank in rows] == [12] * 4  # replicated
    assert [rank["out.weight"] for rank in spawn(4, from_meta, 2)] == [3, 2, 3, 2]


@pytest.mark.parametrize("start", ["meta", "cpu"])
def test_one_device_loads_through_the_same_function(start):
    with torch.device(start):
        model = TinyLadder()
    load_parameters(model, seeded().state_dict(), CPU)
    for name, tensor in full_tensors(model):
        assert torch.equal(tensor, seeded().state_dict()[name]), name


def test_names_are_strict_and_the_nearest_are_named():
    whole = seeded().state_dict()
    whole["blocks.0.upp.weight"] = whole.pop("blocks.0.up.weight")
    with pytest.raises(ValueError, match=r"1 missing, 1 unexpected") as caught:
        load_parameters(seeded(), whole, CPU)
    assert "missing: blocks.0.up.weight (is it blocks.0.upp.weight?)" in str(caught.value)
    assert "unexpected: blocks.0.upp.weight (is it blocks.0.up.weight?)" in str(caught.value)
    with pytest.raises(ValueError, match=r"58 missing, 0 unexpected[\s\S]*and 53 more"):
        load_parameters(seeded(), {}, CPU)


def test_shapes_are_strict():
    whole = seeded().state_dict()
    whole["out.weight"] = whole["out.weight"].T
    with pytest.raises(ValueError, match=r"out.weight has shape \(12, 5\), but the model needs \(5, 12\)"):
        load_parameters(seeded(), whole, CPU)


def test_what_another_stage_holds_must_be_there_and_is_not_read():
    source, model = Lazy(seeded().state_dict()), seeded(1)
    model.out = model.blocks[1] = None
    elsewhere = set(source) - set(model.state_dict())
    load_parameters(model, source, CPU, elsewhere)
    assert {name for name, rows in source.rows.items() if not rows} == elsewhere
    assert torch.equal(model.blocks[2].q.weight, seeded().blocks[2].q.weight)
    del source.tensors["out.bias"]
    with pytest.raises(ValueError, match=r"1 missing, 0 unexpected; missing: out.bias"):
        load_parameters(model, source, CPU, elsewhere)


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("table", torch.arange(4.0, device="cpu"), persistent=False)


def test_buffers_are_loaded_or_kept():
    with torch.device("meta"):
        model = Buffered()
    load_parameters(model, Buffered().state_dict() | {"mean": torch.ones(3)}, CPU)
    assert torch.equal(model.mean, torch.ones(3))
    assert torch.equal(model.table, torch.arange(4.0))


def test_a_table_that_no_checkpoint_holds_cannot_start_on_meta():
    model = Buffered().to("meta")
    with pytest.raises(ValueError, match="table: a buffer that no checkpoint holds"):
        load_parameters(model, Buffered().state_dict(), CPU)


def trained(seed: int) -> tuple[TinyLadder, torch.optim.Optimizer]:
    mesh = make_mesh(ParallelConfig(), "cpu")
    model = parallelize(seeded(seed), TinyLadder.plan, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(3)
    model(torch.randn(2, 4, 5, generator=generator), torch.randn(2, 3, generator=generator)).sum().backward()
    finish_gradients(model, mesh)
    optimizer.step()
    return model, optimizer


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = state(model, optimizer)["optimizer"]["state"]
    both = dict(full_tensors(model))
    for name, values in moments.items():
        average = values["exp_avg"]
        both[name + ".exp_avg"] = average.full_tensor() if isinstance(average, DTensor) else average
    return both


def save(rank: int, world: int, folder: str) -> dict[str, Tensor]:
    model, optimizer = trained(0)
    dcp.save(state(model, optimizer), checkpoint_id=folder)
    return {name: tensor.detach().numpy() for name, tensor in whole_state(model, optimizer).items()}


def load(rank: int, world: int, folder: str) -> dict[str, Tensor]:
    model, optimizer = trained(1)
    target = state(model, optimizer)
    dcp.load(target, checkpoint_id=folder)
    return {name: tensor.detach().numpy() for name, tensor in whole_state(model, optimizer).items()}


def test_a_checkpoint_of_two_ranks_loads_on_one_and_four(tmp_path: Path):
    saved = spawn(2, save, str(tmp_path / "step"))[0]
    assert len(saved) == 2 * 58
    for world in (1, 4):
        loaded = spawn(world, load, str(tmp_path / "step"))[0]
        for name, values in saved.items():
            assert (values == loaded[name]).all(), name


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integers_are_no_weights(dtype):
    whole = seeded().state_dict()
    whole["embed.weight"] = whole["embed.weight"].to(dtype)
    with pytest.raises(ValueError, match=f"embed.weight is {dtype}, but the model needs floating numbers"):
        load_parameters(seeded(), whole, CPU)

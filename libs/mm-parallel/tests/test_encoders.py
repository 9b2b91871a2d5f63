"""Encoders that come and go, and encoders that are shared: the same results in the same order."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm_parallel import ParallelConfig, make_mesh
from mm_parallel.encoders import interleave, ranks_of_sample, share_encoding
from mm_parallel.testing import spawn

DEVICE = torch.device("cpu", 0)  # not the host's name, so that the two can be told apart


class Encoder:
    """Writes down what happens; works only on its device."""

    def __init__(self, fails_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.net, self.fails_at = nn.Linear(3, 2), fails_at
        self.on, self.events = torch.device("cpu"), []

    def place(self, device: torch.device) -> None:
        self.on = device
        self.events.append("in" if device == DEVICE else "out")

    def encode(self, batch: int) -> dict[str, Tensor]:
        assert self.on == DEVICE
        self.events.append(batch)
        if batch == self.fails_at:
            raise RuntimeError("cannot read this one")
        return {"text": self.net(torch.full((1, 3), float(batch))), "number": batch}

    def run(self, every: int, batches) -> list[dict[str, Tensor]]:
        return list(interleave(batches, self.encode, every, self.place, DEVICE))


@pytest.mark.parametrize("every", [1, 2, 3, 7, 9])
def test_interleaved_is_the_same_as_one_at_a_time(every):
    single, encoder = Encoder(), Encoder()
    expected, encoded = single.run(1, range(7)), encoder.run(every, range(7))
    assert [batch["number"] for batch in encoded] == list(range(7))
    for actual, want in zip(encoded, expected, strict=True):
        assert torch.equal(actual["text"], want["text"])
        assert not actual["text"].requires_grad
    assert encoder.events.count("in") == encoder.events.count("out") == -(-7 // every)


def test_the_encoder_is_away_while_its_batches_are_used():
    encoder = Encoder()
    for batch in interleave(range(5), encoder.encode, 2, encoder.place, DEVICE):
        assert encoder.on != DEVICE
        encoder.events.append(f"train {batch['number']}")
    assert encoder.events == [
        *("in", 0, 1, "out", "train 0", "train 1"),
        *("in", 2, 3, "out", "train 2", "train 3"),
        *("in", 4, "out", "train 4"),
    ]


def test_an_endless_stream_is_pulled_as_far_as_needed():
    pulled = []
    endless = (pulled.append(i) or i for i in iter(int, 1))
    encoder = Encoder()
    stream = interleave(endless, encoder.encode, 3, encoder.place, DEVICE)
    assert not pulled
    for _ in range(4):
        next(stream)
    assert len(pulled) == 6
    stream.close()
    assert encoder.on != DEVICE


def test_no_batches_move_nothing():
    encoder = Encoder()
    assert encoder.run(3, []) == []
    assert not encoder.events


def test_an_encoder_that_fails_leaves_the_device():
    encoder = Encoder(fails_at=3)
    stream = interleave(range(9), encoder.encode, 2, encoder.place, DEVICE)
    assert [next(stream)["number"] for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="cannot read this one"):
        next(stream)
    assert encoder.events[-2:] == [3, "out"]


def test_a_group_of_none_is_refused():
    with pytest.raises(ValueError, match="every=0: must be at least 1"):
        Encoder().run(0, range(3))


def encode(i: int) -> dict:
    """Tensors of every kind, shapes that differ from sample to sample."""
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(i + 1, 4, generator=generator)
    return {
        "text": [x, x.to(torch.bfloat16)],
        "views": (x.t(), x[:, ::2], x.sum(), x[:0]),
        "mask": x > 0,
        "ids": x.mul(9).long(),
        "caption": f"sample {i}",
    }


def same(actual: dict, want: dict) -> bool:
    flat = [(*one["text"], *one["views"], one["mask"], one["ids"]) for one in (actual, want)]
    equal = all(a.dtype == w.dtype and torch.equal(a, w) for a, w in zip(*flat, strict=True))
    return equal and actual["caption"] == want["caption"] and type(actual["views"]) is tuple


def shared(rank: int, world: int, layout: ParallelConfig, ranks: list[list[int]]) -> None:
    group = ranks_of_sample(make_mesh(layout, "cpu"))
    mine = next(part for part in ranks if rank in part)
    if len(mine) == 1:
        assert group is None
    else:
        assert dist.get_process_group_ranks(group) == mine
    for count in (7, 2, 1, 0):
        done: list[int] = []
        samples = [100 * mine[0] + i for i in range(count)]
        result = share_encoding(samples, lambda i, done=done: done.append(i) or encode(i), group)
        assert done == samples[mine.index(rank) :: len(mine)]
        assert len(result) == count
        assert all(same(actual, encode(i)) for actual, i in zip(result, samples, strict=True))


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        (ParallelConfig(ulysses=2, tp=2), [[0, 1, 2, 3]]),
        (ParallelConfig(ring=2), [[0, 1], [2, 3]]),
        (ParallelConfig(dp_replicate=2), [[0], [1], [2], [3]]),
        (ParallelConfig(pp_layers=(1, 1)), [[0, 2], [1, 3]]),
    ],
    ids=["ulysses and tp", "ring", "data alone", "pipeline"],
)
def test_ranks_of_a_sample_share_its_encoding(layout, ranks):
    spawn(4, shared, layout, ranks)


def test_one_device_encodes_alone():
    assert ranks_of_sample(None) is None
    assert all(map(same, share_encoding([3, 4], encode, None), map(encode, (3, 4))))


def failing(rank: int, world: int) -> list[str]:
    def encode_or_fail(i: int) -> Tensor:
        if i == 4:
            raise OSError("no such video: four.mp4")
        return torch.ones(i)

    with pytest.raises(RuntimeError) as failed:
        share_encoding(range(6), encode_or_fail, dist.group.WORLD)
    assert isinstance(failed.value.__cause__, OSError) == (rank == 1)
    with pytest.raises(ValueError, match="given different numbers") as different:
        share_encoding(range(3 + rank), encode, dist.group.WORLD)
    assert len(share_encoding(range(4), encode, dist.group.WORLD)) == 4  # the ranks still understand each other
    return [str(failed.value), str(different.value)]


def test_what_fails_on_one_rank_fails_on_all():
    each = [
        "rank 1 could not encode sample 4: OSError: no such video: four.mp4",
        "ranks that share the encoding of samples were given different numbers of them: "
        "rank 0 has 3, rank 1 has 4, rank 2 has 5",
    ]
    assert spawn(3, failing) == [each] * 3

"""Reading shards: the tensors of safetensors, in flat memory, and one line for what has happened to a file."""

import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_data import FeatureCache, FeatureDataset, build_loader
from mm_data.shards import DTYPES, Shards, read_metadata


def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path):
    kinds = {str(dtype): dtype for dtype in DTYPES.values()}
    tensors = {name: torch.arange(24).reshape(2, 3, 4).to(dtype) for name, dtype in kinds.items()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"what": "it says"})
    found, expected = Shards().read(tmp_path / "a.safetensors", tensors), load_file(tmp_path / "a.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)
    assert read_metadata(tmp_path / "a.safetensors") == {"what": "it says"}


@pytest.fixture
def store(tmp_path):
    with FeatureCache(tmp_path, shard_bytes=1) as cache:  # a shard for each
        for number in range(3):
            tensors = {"latents": torch.full((4, 2, 2, 2), float(number)), "text.0": torch.ones(3, 8)}
            cache.put(f"key{number}", tensors, {"id": f"v{number}"})
    cache.finish()
    return tmp_path


def cut_off(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 40)


def rewrite(**changes):
    def change(shard: Path) -> None:
        tensors = load_file(shard)
        key = next(iter(tensors)).split("/")[0]
        save_file({f"{key}/latents": tensors[f"{key}/latents"], **{f"{key}/{k}": v for k, v in changes.items()}}, shard)

    return change


def scramble(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[8:40] = b"x" * 32
    shard.write_bytes(data)


def become_a_pipe(shard: Path) -> None:
    shard.unlink()
    os.mkfifo(shard)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "is gone: extract again"),
        (cut_off, r"cut off: it has \d+ bytes, its header says \d+: delete it and extract again"),
        (lambda shard: os.truncate(shard, 5), "5 bytes hold no whole header"),
        (lambda shard: os.truncate(shard, 0), "0 bytes hold no whole header"),
        (scramble, "its header cannot be read .*: delete it and extract again"),
        (rewrite(), r"does not hold key\d/text.0, so it is of another extraction"),
        (rewrite(**{"text.0": torch.ones(2, 8)}), r"text.0 of sample v\d has shape \[2, 8\], .* says \[3, 8\]"),
        (become_a_pipe, r"is a named pipe \(FIFO\), not a file"),
    ],
)
@pytest.mark.parametrize("in_use", [False, True])
def test_what_has_happened_to_a_shard_is_said(store, change, message, in_use):
    """…by training, which names the shard; no bus error where it is cut off under a reader."""
    dataset = FeatureDataset(store)
    if in_use:
        dataset[1]
    change(dataset.records[1].file)
    with pytest.raises(ValueError, match=rf"{dataset.records[1].file}.*{message}"):
        dataset[1]
    assert dataset[0]["latents"].unique().tolist() == [0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a"', "line 2: not JSON"),
        ('{"id": "a"}', "line 2: no sample of a feature store"),
        ("[]", "line 2: no sample of a feature store"),
        ('{"id": "a", "key": "k", "shard": "s", "shapes": 3}', "line 2: no sample of a feature store"),
        ('{"id": "a", "key": "k", "shard": "s", "shapes": {}}', "line 2: no sample .*latents, text.0"),
        ('{"id": "a", "key": "k", "shard": "s", "shapes": {"latents": [[1], 2, 3, 4]}}', "line 2: .*whole numbers"),
        ('{"id": "a", "key": "k", "shard": "s", "shapes": {"latents": [1e400, 2, 3, 4]}}', "line 2: .*whole numbers"),
        ('{"id": "a", "key": "k", "shard": "s", "shapes": {"latents": [4], "text.1": [3, 8]}}', "line 2: .*text.0"),
        ('{"id": ["a"], "key": "k", "shard": "s", "shapes": {"latents": [4], "text.0": [3, 8]}}', "line 2: .*be text"),
    ],
)
def test_damaged_lists_are_refused_by_line(store, line, message):
    index = store / "dataset.jsonl"
    index.write_text(index.read_text().split("\n")[0] + f"\n{line}\n")
    with pytest.raises(ValueError, match=rf"dataset\.jsonl, {message}"):
        FeatureDataset(store)


def test_reading_on_and_on_takes_no_more_memory(store):
    """…where safetensors' own reader keeps 64 bytes of each tensor: 2 MB here."""
    steps = iter(build_loader(FeatureDataset(store), global_batch=3, num_workers=0, small_buckets="repeat"))
    for _ in range(500):
        next(steps)
    before = resident()
    for _ in range(5_000):
        next(steps)
    assert resident() - before < 1 << 19


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_only_so_many_headers_are_remembered(store):
    shards, files = Shards(remembered=4), sorted(store.glob("shards/*.safetensors"))
    for file in [*files, *files]:
        shards.read(file, [])
        assert len(shards._headers) <= 2
    assert next(reversed(shards._headers))[0] == files[-1]

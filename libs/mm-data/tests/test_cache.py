"""The store: whole entries or none, whoever writes and whenever they are killed."""

import json
import multiprocessing
import os
import resource
import signal
import time

import av
import pytest
import torch
from safetensors.torch import save_file

from mm_data import FeatureCache, FeatureDataset, Geometry, Sample, content_key
from mm_data.video import decoder_identity

ENTRIES = 600


def write(path, first, step):
    with FeatureCache(path, shard_bytes=4000) as cache:
        for i in range(first, ENTRIES, step):
            if f"key{i}" not in cache:
                generator = torch.Generator().manual_seed(i)
                latents = torch.randn(4, 1 + i % 3, 4, 4, generator=generator)
                text = torch.randn(3, 8, generator=generator)
                cache.put(f"key{i}", {"latents": latents, "text.0": text}, {"id": f"video {i}"})


def writers(path, ranks):
    """Processes that fill a store together. Forked: a fresh interpreter would take longer to start than to write."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write, args=(path, rank, ranks)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def contents(path):
    cache = FeatureCache(path)
    return {key: {n: (t.shape, t.numpy().tobytes()) for n, t in cache.get(key).items()} for key in sorted(cache.keys())}


def test_killed_at_random_moments_then_finished_is_the_undisturbed_store(tmp_path):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    begun = time.perf_counter()
    write(undisturbed, 0, 1)
    whole = time.perf_counter() - begun
    survived = [0]
    for delay in torch.rand(8, generator=torch.Generator().manual_seed(7)).tolist():
        processes = writers(disturbed, 2)
        time.sleep(delay * whole / 8)
        for process in processes:
            process.kill()
            process.join()
        survived.append(len(contents(disturbed)))
        if 0 < survived[-1] < ENTRIES:
            with pytest.raises(ValueError, match="has not finished"):
                FeatureDataset(disturbed)
    assert survived == sorted(survived)
    assert any(0 < n < ENTRIES for n in survived)  # else the kills came too early or too late to show anything
    (disturbed / "shards" / ".tmp-left-by-a-kill").write_bytes(b"half")
    for process in writers(disturbed, 3):  # on another number of ranks
        process.join()
        assert process.exitcode == 0
    assert [FeatureCache(path).finish() for path in (undisturbed, disturbed)] == [ENTRIES, ENTRIES]
    assert contents(disturbed) == contents(undisturbed)
    assert not [p for p in disturbed.rglob("*") if p.name.startswith(".tmp")]
    one, two = FeatureDataset(undisturbed), FeatureDataset(disturbed)
    assert one.ids == two.ids
    assert one.buckets == two.buckets
    assert all(torch.equal(one[i]["latents"], two[i]["latents"]) for i in range(0, ENTRIES, 50))


def entry(value=0.0, frames=1):
    return {"latents": torch.full((2, frames, 2, 2), value), "text.0": torch.zeros(1, 3)}


@pytest.fixture
def samples(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    made = []
    for name, data in (("a/0.mp4", b"one"), ("b/0.mp4", b"two"), ("b/copy.mp4", b"one")):
        (tmp_path / name).write_bytes(data)
        made.append(Sample(name, tmp_path / name, ("a cat",)))
    return made


def encode(cache, todo):
    for sample in todo.to_encode:
        meta = {"id": sample.id, "source": list(sample.contents[0].stamp), "sha256": sample.contents[0].sha256}
        cache.put(todo.keys[sample.id], entry(float(len(sample.id))), meta)
    cache.flush()


def test_entries_are_named_by_content_not_by_file_name(tmp_path, samples):
    with FeatureCache(tmp_path / "out") as cache:
        todo = cache.find_work(samples, Geometry(), "encoder")
        assert [s.id for s in todo.to_encode] == ["a/0.mp4", "b/0.mp4"]
        assert [s.id for s in todo.repeated] == ["b/copy.mp4"]
        encode(cache, todo)
        again = cache.find_work(samples, Geometry(), "encoder")
        assert not again.to_encode
        assert cache.finish(again) == 3
    dataset = FeatureDataset(tmp_path / "out")
    assert dataset.ids == ["a/0.mp4", "b/0.mp4", "b/copy.mp4"]  # the order of the manifest
    assert torch.equal(dataset[0]["latents"], dataset[2]["latents"])


@pytest.mark.parametrize(
    "change",
    [
        {"geometry": Geometry(num_frames=17)},
        {"geometry": Geometry(window="start")},
        {"encoder": "another"},
        {"seed": 1},
        {"captions": ("a dog",)},
        {"bytes": b"ONE"},
    ],
)
def test_whatever_decides_the_tensors_makes_them_stale(tmp_path, samples, change):
    common = {"geometry": Geometry(), "encoder": "encoder", "seed": 0}
    with FeatureCache(tmp_path / "out") as cache:
        encode(cache, cache.find_work(samples[:1], **common))
    cache = FeatureCache(tmp_path / "out")
    assert not cache.find_work(samples[:1], **common).to_encode
    asked = samples[:1]
    if "captions" in change:
        asked = [Sample("a/0.mp4", samples[0].path, change.pop("captions"))]
    if "bytes" in change:
        time = samples[0].path.stat().st_mtime_ns
        samples[0].path.write_bytes(change.pop("bytes"))
        os.utime(samples[0].path, ns=(time, time))  # as `cp -p` does; of the same size, too
    todo = cache.find_work(asked, **(common | change))
    assert len(todo.to_encode) == 1
    assert todo.stale == 1
    encode(cache, todo)
    cache.finish(todo)
    assert len(FeatureDataset(tmp_path / "out")) == 1
    with pytest.raises(ValueError, match="two versions"):
        cache.finish()


def test_the_empty_prompt_of_other_encoders_was_not_decoded(tmp_path, samples):
    with FeatureCache(tmp_path / "out") as cache:
        cache.put_empty_text(torch.zeros(1, 8), "another encoder")
    todo = FeatureCache(tmp_path / "out").find_work(samples[:1], Geometry(), "encoder")
    assert todo.stale == 1
    assert "decoder" not in str(todo)


def test_entries_of_another_decoder_are_stale(tmp_path, samples, monkeypatch):
    """PyAV 15 and 16 read other colours than 17 from the same file: the two are not mixed."""
    with FeatureCache(tmp_path / "out") as cache:
        for decoder in ("PyAV 16.0.1 libavcodec 61.19.101", decoder_identity()):
            monkeypatch.setattr("mm_data.cache.decoder_identity", lambda _, name=decoder: name)
            todo = cache.find_work(samples[:1], Geometry(), "e")
            assert len(todo.to_encode) == 1
            meta = {"id": "a/0.mp4", "decoder": decoder}
            cache.put(todo.keys["a/0.mp4"], entry(), meta)
    todo = FeatureCache(tmp_path / "out").find_work(samples[:1], Geometry(), "e")
    assert (len(todo.done), todo.stale) == (1, 1)
    assert "1 stale entry, 1 from PyAV 16.0.1 libavcodec 61.19.101; videos are decoded by PyAV" in str(todo)
    assert cache.finish(todo) == 1
    with FeatureCache(tmp_path / "out") as cache:
        cache.put_empty_text(torch.zeros(1, 4), "e")
    todo = FeatureCache(tmp_path / "out").find_work([], Geometry(), "another encoder")
    assert "3 stale entries, 1 from PyAV 16.0.1 libavcodec 61.19.101; videos" in str(todo)  # no video decoded the text
    assert decoder_identity("pyav").startswith(f"PyAV {av.__version__} libavformat ")


def test_the_seed_counts_only_where_it_is_used():
    assert content_key("f", Geometry(), "e", seed=1) != content_key("f", Geometry(), "e", seed=2)
    fixed = Geometry(window="center")
    assert content_key("f", fixed, "e", seed=1) == content_key("f", fixed, "e", seed=2)


def test_entries_keep_their_keys():
    """Written down before `time_stride`: a store of then is still one of now."""
    control = {"source": "s", "mask": None, "references": []}
    vace = content_key("f", Geometry(rule="vace", num_frames=17), "e", ["a"], None, 3, control)
    assert vace.startswith("24b3165ec103b64ca28c21ee95967126")
    assert content_key("f", Geometry(time_stride=8), "e") != content_key("f", Geometry(), "e")


def test_moved_files_keep_their_entries(tmp_path, samples):
    with FeatureCache(tmp_path / "out") as cache:
        encode(cache, cache.find_work(samples[:1], Geometry(), "e"))
    moved = samples[0].path.rename(tmp_path / "elsewhere.mp4")
    assert (
        not FeatureCache(tmp_path / "out")
        .find_work([Sample("elsewhere.mp4", moved, ("a cat",))], Geometry(), "e")
        .to_encode
    )


def test_unchanged_files_are_not_read_again(tmp_path, samples, monkeypatch):
    with FeatureCache(tmp_path / "out") as cache:
        encode(cache, cache.find_work(samples, Geometry(), "e"))
    monkeypatch.setattr("mm_data.cache.fingerprint", lambda path: pytest.fail(f"{path} was read"))
    assert len(FeatureCache(tmp_path / "out").find_work(samples[:2], Geometry(), "e").done) == 2


def test_failures_are_listed_until_they_succeed(tmp_path, samples):
    gone = Sample("gone.mp4", tmp_path / "gone.mp4", ("x",))
    cache = FeatureCache(tmp_path / "out")
    todo = cache.find_work([*samples, gone], Geometry(), "e")
    assert "No such file" in todo.failed[0][1]
    cache.put(todo.keys["a/0.mp4"], entry(), {"id": "a/0.mp4"})
    cache.fail("b/0.mp4", "cut off")
    assert FeatureCache(tmp_path / "out").failures() == {"b/0.mp4": "cut off"}
    assert cache.finish(todo) == 2
    log = tmp_path / "out" / "failures.jsonl"
    assert {json.loads(line)["id"] for line in log.read_text().splitlines()} == {"b/0.mp4", "gone.mp4"}
    again = FeatureCache(tmp_path / "out")
    todo = again.find_work(samples, Geometry(), "e")
    encode(again, todo)
    with pytest.raises(ValueError, match="has not finished"):
        FeatureDataset(tmp_path / "out")  # extended and not yet finished
    assert again.finish(todo) == 3
    assert log.read_text() == ""


def test_other_writers_are_seen_after_refresh(tmp_path):
    mine, other = FeatureCache(tmp_path), FeatureCache(tmp_path)
    other.put("k", entry(3.0), {"id": "a"})
    assert torch.equal(other.get("k")["latents"], entry(3.0)["latents"])  # before it is committed
    other.flush()
    assert "k" not in mine
    mine.refresh()
    assert torch.equal(mine.get("k")["latents"], entry(3.0)["latents"])
    assert mine.meta("k")["shapes"]["latents"] == [2, 1, 2, 2]
    mine.put("k", entry(4.0), {"id": "a"})
    mine.flush()
    assert len(list(tmp_path.glob("shards/*"))) == 1  # same key, same content: not written again


def test_an_exception_in_the_block_loses_nothing_that_was_put(tmp_path):
    def run():
        with FeatureCache(tmp_path) as cache:
            cache.put("k", entry(), {"id": "a"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert FeatureCache(tmp_path).keys() == {"k"}


@pytest.mark.parametrize(
    "meta",
    [
        *("5", "[]", "{}", '{"id": 5, "shapes": {}}', '{"id": "a", "shapes": 5}'),
        '{"id": "a", "shapes": {}, "source": 5, "sha256": "x"}',
        '{"id": "a", "shapes": {}, "source": [["a"], "b"], "sha256": "x"}',
        '{"id": "a", "shapes": {}, "control": [5]}',
        '{"id": "a", "shapes": {}, "notes": [[]]}',
        '{"id": "a", "shapes": {}, "decoder": []}',
    ],
)
def test_a_shard_that_says_odd_things_of_an_entry_is_named(tmp_path, meta):
    (tmp_path / "shards").mkdir()
    save_file({"k/latents": torch.zeros(1)}, tmp_path / "shards" / "a-0.safetensors", {"k": meta})
    with pytest.raises(ValueError, match=r"a-0\.safetensors is damaged: what it says of an entry .*extract again"):
        FeatureCache(tmp_path)


@pytest.mark.parametrize("record", ["5", "[]", "{}", '{"id": ["a"], "reason": "x"}', '{"id": "a"}'])
def test_odd_lines_of_failures_are_named(tmp_path, record):
    (tmp_path / "failures.jsonl").write_text(f"{record}\n")
    with pytest.raises(ValueError, match=r"failures\.jsonl, line 1: no failure of a sample"):
        FeatureCache(tmp_path).failures()


def test_values_do_not_follow_the_callers_tensor(tmp_path):
    tensors = entry(1.0)
    cache = FeatureCache(tmp_path)
    cache.put("k", tensors, {"id": "a"})
    tensors["latents"].zero_()
    cache.flush()
    assert (FeatureCache(tmp_path).get("k")["latents"] == 1).all()


def test_a_failed_write_names_the_file_and_leaves_no_piece(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.put("k", {"latents": torch.zeros(2, 1, 64, 64)}, {"id": "a"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large while writing 32,\d+ bytes.*safetensors"):
            cache.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("shards/*"))
    cache.flush()  # there is room now, and nothing is lost
    assert FeatureCache(tmp_path).keys() == {"k"}


def test_bad_stores_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        FeatureCache(tmp_path / "file")
    with pytest.raises(ValueError, match="is not a folder"):
        FeatureDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no features here; expected .*mm_train\.extract --output"):
        FeatureDataset(tmp_path)
    with pytest.raises(ValueError, match="must hold the sample's id"):
        FeatureCache(tmp_path).put("k", entry(), {})
    FeatureCache(tmp_path).finish()
    with pytest.raises(ValueError, match="lists no samples"):
        FeatureDataset(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.safetensors").write_bytes(b"half a shard")
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged.*delete it"):
        FeatureCache(tmp_path)


def test_conditions_must_match_within_a_shape(tmp_path):
    with FeatureCache(tmp_path) as cache:
        cache.put("a", entry(), {"id": "a"})
        cache.put("b", {**entry(), "image": torch.zeros(2)}, {"id": "b"})
        cache.put("c", {**entry(frames=2), "image": torch.zeros(2)}, {"id": "c"})
    cache.finish()
    with pytest.raises(ValueError, match="samples a and b"):
        FeatureDataset(tmp_path)

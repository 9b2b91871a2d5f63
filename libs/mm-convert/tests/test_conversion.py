"""There and back again, byte for byte; and what stops a conversion before it starts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mm_convert import convert, inspect, open_checkpoint
from mm_convert.write.prepare import prepare_like


def contents(folder):
    """All files but the note on where they come from."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "mm_convert.json"}


def safetensors(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "wide"])
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("to", ["mm", "original"])
def test_round_trip_is_byte_identical(kind, files, to, toys, tmp_path):
    source = toys.diffusers(tmp_path / "source", kind, files)
    convert(source, tmp_path / "there", to)
    convert(tmp_path / "there", tmp_path / "back", "diffusers")
    assert safetensors(tmp_path / "back") == safetensors(source)
    assert json.loads((tmp_path / "back/config.json").read_text()) == toys.diffusers_config(toys.kinds[kind])
    there = open_checkpoint(tmp_path / "there")
    assert (there.dialect, there.layout) == ("original", "mm" if to == "mm" else "safetensors")


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_any_dtype_passes(dtype, toys, tmp_path):
    source = toys.diffusers(tmp_path / "source", dtype=dtype)
    convert(source, tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "back", "diffusers")
    assert safetensors(tmp_path / "back") == safetensors(source)


def test_values_stay_with_their_names(toys, tmp_path):
    torch = pytest.importorskip("torch")
    source = toys.diffusers(tmp_path / "source", "i2v", files=3, dtype="BF16")
    convert(source, tmp_path / "there", shard_bytes=9_000)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "there")
    assert set(before) == set(after)
    for name in before:
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))


def test_the_files_that_other_tools_look_for(toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    convert(source, tmp_path / "one", "diffusers")
    assert set(contents(tmp_path / "one")) == {"config.json", "diffusion_pytorch_model.safetensors"}
    convert(source, tmp_path / "several", "diffusers", shard_bytes=40_000)
    names = sorted(safetensors(tmp_path / "several"))
    assert names[0] == f"diffusion_pytorch_model-00001-of-{len(names):05}.safetensors"
    index = json.loads((tmp_path / "several/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names
    assert index["metadata"]["total_size"] == inspect(source).nbytes
    for file in (tmp_path / "several").glob("*.safetensors"):
        assert file.stat().st_size < 40_000 + 12_000  # data and header
    convert(source, tmp_path / "mm")
    expected = {"config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert set(contents(tmp_path / "mm")) == expected
    about = json.loads((tmp_path / "mm/config.json").read_text())
    assert (about["format"], about["version"], about["family"], about["dialect"]) == ("mm", 1, "wan", "original")


def test_diffusers_loads_what_we_write(toys, tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel.from_config(toys.diffusers_config(toys.kinds["flf2v"]))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    convert(tmp_path / "theirs", tmp_path / "original", "original")
    convert(tmp_path / "original", tmp_path / "back", "diffusers")
    assert safetensors(tmp_path / "back") == safetensors(tmp_path / "theirs")
    again, info = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_like_another_model(toys, tmp_path):
    published = toys.diffusers(tmp_path / "published", "i2v", files=3)
    convert(published, tmp_path / "mm", shard_bytes=9_000)
    prepare_like(open_checkpoint(tmp_path / "mm"), tmp_path / "out", open_checkpoint(published)).write()
    ours, theirs = contents(tmp_path / "out"), contents(published)
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert json.loads(ours.pop(index))["weight_map"] == json.loads(theirs.pop(index))["weight_map"]
    assert ours == theirs
    other = toys.diffusers(tmp_path / "other", "t2v")
    with pytest.raises(ValueError, match="is another model"):
        prepare_like(open_checkpoint(tmp_path / "mm"), tmp_path / "out2", open_checkpoint(other))


def test_dropped_tensors_are_said_and_gone(toys, tmp_path):
    shapes = toys.shapes("diffusers", toys.kinds["i2v"])
    published = shapes | {f"blocks.{i}.attn2.norm_added_q.weight": (24,) for i in range(3)}
    source = toys.write_checkpoint(tmp_path / "source", published, files=2)
    (source / "config.json").write_text(json.dumps(toys.diffusers_config(toys.kinds["i2v"])))
    notes = convert(source, tmp_path / "mm").notes
    assert len(notes) == 1
    assert "3 tensors are left out" in notes[0]
    convert(tmp_path / "mm", tmp_path / "back", "diffusers")
    assert set(open_checkpoint(tmp_path / "back").content.translate("diffusers").values()) == set(shapes)


def test_a_refused_conversion_leaves_nothing(toys, tmp_path):
    shapes = toys.shapes("diffusers", toys.kinds["t2v"]) | {"surplus": (3,)}
    toys.write_checkpoint(tmp_path / "source", shapes)
    with pytest.raises(ValueError, match="unknown: surplus"):
        convert(tmp_path / "source", tmp_path / "out")
    toys.diffusers(tmp_path / "good")
    with pytest.raises(ValueError, match="choose one of mm, original, diffusers, mindspeed, dcp"):
        convert(tmp_path / "good", tmp_path / "out", "difusers")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "good"}


def test_a_file_where_a_folder_should_be_is_named(toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    (tmp_path / "afile").touch()
    with pytest.raises(ValueError, match=r"afile is a file, not a folder"):
        convert(source, tmp_path / "afile" / "x")


def test_an_existing_target_is_safe(toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out")  # an empty folder may be filled
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"exists; name another target, or replace it with --overwrite true"):
        convert(source, tmp_path / "out", "original")
    assert contents(tmp_path / "out") == before
    convert(source, tmp_path / "out", "original", overwrite=True)
    assert set(contents(tmp_path / "out")) == {"config.json", "diffusion_pytorch_model.safetensors"}
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.tex"):
        convert(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/thesis.tex").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_in_place(toys, tmp_path):
    source = toys.diffusers(tmp_path / "model", files=2)
    before = safetensors(source)
    convert(source, source, "original", overwrite=True)
    assert open_checkpoint(source).dialect == "original"
    convert(source, source, "diffusers", overwrite=True)
    assert safetensors(source) == before


SMALL_DISK = """
import resource, signal, sys
from mm_convert import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
convert(sys.argv[1], sys.argv[2])
"""


def test_a_failed_write_leaves_nothing(toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    arguments = [sys.executable, "-c", SMALL_DISK, str(source), str(tmp_path / "out")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert "OSError: [Errno 27]" in result.stderr  # file too large: the nearest to a full disk without one
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


KILLED = """
import os, pathlib, sys
from mm_convert.tensors import views as tensors
from mm_convert.read.checkpoint import open_checkpoint
from mm_convert.write.prepare import prepare_conversion
left = int(sys.argv[4])
def counted(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return function(*arguments, **named)
    return call
tensors._copy = counted(tensors._copy)
tensors.chunks = counted(tensors.chunks)
for name in ("rename", "replace", "write_bytes", "write_text"):
    setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
prepare_conversion(open_checkpoint(sys.argv[1], published=True), sys.argv[2], sys.argv[3]).write(overwrite=False)
"""


@pytest.mark.parametrize("to", ["mm", "mindspeed"])
@pytest.mark.parametrize("in_place", [False, True])
def test_kill_9_at_any_moment_leaves_the_target_absent_or_complete(to, in_place, toys, tmp_path):
    before = open_checkpoint(toys.diffusers(tmp_path / "reference", files=2))
    for moment in range(1, 30):
        source = toys.diffusers(tmp_path / f"{moment}/source", files=2)
        expected = contents(source)
        target = source if in_place else tmp_path / f"{moment}/out"
        arguments = [sys.executable, "-c", KILLED, str(source), str(target), to, str(moment)]
        code = subprocess.run(arguments, check=False).returncode
        assert code in (0, -9)
        assert {name: (source / name).read_bytes() for name in expected} == expected
        if in_place or target.exists():
            made = open_checkpoint(target)
            assert made.layout == to or in_place
            assert {n: t.shape for n, t in made.tensors.items()} == {n: t.shape for n, t in before.tensors.items()}
        if code == 0:
            assert open_checkpoint(target).layout == to
            break
    assert code == 0
    assert moment > 3

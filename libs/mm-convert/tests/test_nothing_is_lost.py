"""What must survive: published files, training runs, the file that says which checkpoint is meant."""

from __future__ import annotations

import json

import pytest

from mm_convert import convert, open_checkpoint
from mm_convert.cli import main
from mm_convert.store.torch_file import read_torch_file, write_torch_file
from mm_convert.write.prepare import prepare_conversion, prepare_like


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def published(folder):
    return {name: data for name, data in files(folder).items() if "/" not in name and name.startswith(("diff", "conf"))}


@pytest.mark.parametrize("to", ["mm", "mindspeed"])
def test_published_files_survive_converting_in_place_again_and_again(to, toys, tmp_path):
    folder = toys.diffusers(tmp_path / "T", files=2)
    before = published(folder)
    convert(folder, folder, to)
    with pytest.raises(ValueError, match="exists"):
        convert(folder, folder, to)
    convert(folder, folder, to, pp_layers=[1, 2], overwrite=True)
    assert published(folder) == before
    assert open_checkpoint(folder).layout == to
    other = "mindspeed" if to == "mm" else "mm"
    for again in (open_checkpoint(folder), open_checkpoint(folder, published=True)):
        with pytest.raises(ValueError, match="it would not be clear which is meant"):
            prepare_conversion(again, folder, other)
    (folder / "mm").mkdir(exist_ok=True)  # by hand, both are there
    (folder / "mm/config.json").write_text("{}")
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(ValueError, match=r"holds mm/ and what latest_checkpointed_iteration\.txt names; name one"):
        open_checkpoint(folder)
    with pytest.raises(ValueError, match="holds published files and what was made of them"):
        convert(toys.diffusers(tmp_path / "S"), folder, overwrite=True)
    assert published(folder) == before


def test_a_repository_converted_in_place_is_opened_as_what_was_made(toys, tmp_path):
    toys.diffusers(tmp_path / "R/transformer")
    convert(tmp_path / "R", tmp_path / "R", "mm")
    assert open_checkpoint(tmp_path / "R").layout == "mm"
    assert open_checkpoint(tmp_path / "R", published=True).dialect == "diffusers"


def test_a_run_stays_what_is_opened(toys, tmp_path):
    pytest.importorskip("torch")
    convert(toys.diffusers(tmp_path / "source"), tmp_path / "run", "dcp")
    for to in ("mm", "mindspeed", "diffusers"):
        with pytest.raises(ValueError, match="holds dcp; with both it would not be clear"):
            convert(tmp_path / "run", tmp_path / "run", to, overwrite=True)


def test_training_runs_are_not_replaced(toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    run = tmp_path / "run"
    convert(source, run, "mindspeed")
    (run / "release").rename(run / "iter_0000500")
    (run / "iter_0000500/mp_rank_00/distrib_optim.pt").write_bytes(b"moments")
    (run / "latest_checkpointed_iteration.txt").write_text("500")
    before = files(run)
    with pytest.raises(ValueError, match="holds iter_0000500, which is no part"):
        convert(source, run, "mindspeed", overwrite=True)
    with pytest.raises(ValueError, match=r"txt says 500: a training run's"):
        convert(run, run, "mindspeed", overwrite=True)
    with pytest.raises(ValueError, match="holds the source"):
        convert(run / "iter_0000500", run, "original", overwrite=True)
    assert files(run) == before
    tree = tmp_path / "tree"
    convert(source, tree, "mindspeed")
    (tree / "release/mp_rank_00/distrib_optim.pt").write_bytes(b"moments")
    with pytest.raises(ValueError, match=r"distrib_optim\.pt, which is no part"):
        convert(source, tree, "mindspeed", overwrite=True)


def test_published_files_beside_a_tree_are_written_once(toys, tmp_path):
    source = toys.diffusers(tmp_path / "source", files=2)
    tree = tmp_path / "tree"
    convert(source, tree, "mindspeed")
    convert(tree, tree, "diffusers")
    with pytest.raises(ValueError, match="beside the source; name another target"):
        convert(tree, tree, "diffusers", overwrite=True)
    assert open_checkpoint(tree).layout == "mindspeed"
    assert open_checkpoint(tree, published=True).dialect == "diffusers"


def test_ranks_that_differ_where_they_should_not_are_refused(toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    convert(source, tmp_path / "tree", "mindspeed", tp_size=2)
    file = tmp_path / "tree/release/mp_rank_01/model_optim_rng.pt"
    tensor = read_torch_file(file)["model"]["blocks.1.ffn.0.bias"]
    data = bytearray(file.read_bytes())
    data[tensor.start : tensor.start + 8] = bytes(8)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.0\.bias should be the same on all tensor-parallel ranks"):
        open_checkpoint(tmp_path / "tree")


def test_no_option_is_ignored(toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    for options, said in (
        (dict(to="mindspeed", tp_size=2), "one file, which holds whole tensors"),
        (dict(to="dcp"), "torch DCP is a folder"),
        (dict(to="original", shard_bytes=10), "a size of files is for folders"),
        (dict(to="original", pp_layers=[1, 2]), "is not split into stages"),
    ):
        with pytest.raises(ValueError, match=said):
            convert(source, tmp_path / "x.pt", **options)
    for layers in ([[1], 2], [1.5, 1.5], ["3"]):
        with pytest.raises(ValueError, match="expected are whole numbers"):
            convert(source, tmp_path / "x", "mindspeed", pp_layers=layers)
    with pytest.raises(ValueError, match="shard_bytes is -1"):
        convert(source, tmp_path / "x", shard_bytes=-1)
    assert not (tmp_path / "x").exists()


def test_a_moving_average_is_never_replaced_by_the_weights(toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    convert(source, tmp_path / "flat.pt", "original")
    convert(source, tmp_path / "mm")
    for path in (source, tmp_path / "flat.pt", tmp_path / "mm"):
        with pytest.raises(ValueError, match=r"no moving average|no tensors under names"):
            open_checkpoint(path, part="ema")


def test_layerzero_takes_the_iteration_the_prefix_and_the_average(toys, tmp_path):
    source = open_checkpoint(toys.diffusers(tmp_path / "source"))
    names = source.content.translate("mindspeed")
    tensors = {f"predictor.{names[ours]}": tensor for ours, tensor in source.tensors.items()}
    other = open_checkpoint(toys.diffusers(tmp_path / "other"))
    average = {f"predictor.{names[ours]}": tensor for ours, tensor in other.tensors.items()}
    for step in (3, 20):
        folder = tmp_path / f"run/iter_{step:07d}/mp_rank_00"
        folder.mkdir(parents=True)
        content = {"model": tensors if step == 20 else average, "ema_model": average, "iteration": step}
        write_torch_file(folder / "model_optim_rng.pt", content, lambda _: None)
    command = ["WanConverter", "layerzero_to_mm", "--cfg.source_path", str(tmp_path / "run"), "--cfg.target_path"]

    def made(name, *options):
        main([*command, str(tmp_path / name), *options])
        return open_checkpoint(tmp_path / name).tensors["head.modulation"].read()

    weights, averages = (c.tensors["head.modulation"].read() for c in (source, other))
    assert weights != averages
    assert made("newest", "--prefix", "predictor") == weights
    assert made("ema", "--ema_model", "true") == averages
    assert made("third", "--iteration", "3") == averages


def test_config_says_the_dtype_that_is_written(toys, tmp_path):
    pytest.importorskip("torch")
    source = toys.diffusers(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    prepare_like(open_checkpoint(source), tmp_path / "out", open_checkpoint(source), dtype="bfloat16").write()
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_links_out_of_a_tree_or_beside_weights_are_refused(toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    (tmp_path / "secret.txt").write_text("not yours")
    (source / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="outside its folder"):
        prepare_like(open_checkpoint(source), tmp_path / "out", open_checkpoint(source))
    (source / "notes.txt").unlink()
    convert(source, tmp_path / "tree", "mindspeed")
    rank = tmp_path / "tree/release/mp_rank_00"
    rank.rename(tmp_path / "elsewhere")
    rank.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="outside its folder"):
        prepare_conversion(open_checkpoint(tmp_path / "tree"), tmp_path / "out")


def test_what_a_conversion_did_not_make_is_not_overwritten(toys, tmp_path):
    source = toys.diffusers(tmp_path / "S", files=2)
    shard = source / "diffusion_pytorch_model-00001-of-00002.safetensors"
    (tmp_path / "thesis.pt").write_text("years of work")
    run = tmp_path / "R/iter_0000500"
    convert(source, tmp_path / "tree", "mindspeed")
    (tmp_path / "R").mkdir()
    (tmp_path / "tree/release").rename(run)
    alone = toys.diffusers(tmp_path / "F") / "diffusion_pytorch_model.safetensors"
    toys.write_safetensors(tmp_path / "F/b.safetensors", {"x": (2,)})
    before = files(tmp_path)
    for origin, target, said in (
        (source, shard, "holds the source"),
        (source, tmp_path / "thesis.pt", "may hold more than weights"),
        (source, run, "may be of a training run"),
        (source, run / "mp_rank_00/model_optim_rng.pt", "may hold more than weights"),
        (alone, tmp_path / "F", "holds the source"),
    ):
        with pytest.raises(ValueError, match=said):
            convert(origin, target, "original", overwrite=True)
    assert files(tmp_path) == before
    convert(source, tmp_path / "made.pt", "original")
    convert(source, tmp_path / "made.pt", "diffusers", overwrite=True)
    assert open_checkpoint(tmp_path / "made.pt").dialect == "diffusers"

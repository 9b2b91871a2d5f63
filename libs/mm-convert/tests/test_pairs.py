"""Two experts converted and inspected as one: every layout into every other, and nothing that is no pair."""

from __future__ import annotations

import json

import pytest

from mm_convert import diff, open_checkpoint, open_experts, open_lora
from mm_convert.cli import main
from mm_convert.families import VACE, WAN
from mm_convert.families.presets import published_boundary
from mm_convert.store.safetensors import read_file, write_file

OURS, DIFFUSERS = ("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")


def mm_convert(*words):
    main([str(word) for word in words])


@pytest.fixture
def pair(toys, tmp_path):
    """As diffusers has it."""
    for name in DIFFUSERS:
        toys.diffusers(tmp_path / "pair" / name, "wide", files=2)
    (tmp_path / "pair" / "model_index.json").write_text('{"_class_name": "WanPipeline", "boundary_ratio": 0.9}')
    return tmp_path / "pair"


def adapter(folder, scale):
    torch, save_file = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch").save_file
    folder.mkdir(parents=True)
    names = (f"base_model.model.blocks.0.self_attn.q.lora_{letter}.weight" for letter in "AB")
    tensors = dict(zip(names, (torch.full((2, 24), scale), torch.full((24, 2), scale)), strict=True))
    save_file(tensors, folder / "adapter_model.safetensors", {"rank": "2", "alpha": "3"})


def same(a, b):
    pytest.importorskip("torch")
    one, other = open_experts(a), open_experts(b)
    assert not any(difference for i in (0, 1) for difference in diff(one[i], other[i]))
    assert any(diff(one.high, other.low)), "the experts are two"


def test_every_layout_and_back(pair, tmp_path):
    for form in ("mm", "original", "mindspeed"):
        there, back = tmp_path / form, tmp_path / f"back-{form}"
        split = ("--pp_layers", "[1,2]") if form == "mindspeed" else ()
        mm_convert("convert", pair, there, "--to", form, *split)
        assert {path.name for path in there.iterdir()} == {*OURS, "experts.json"}
        assert open_experts(there).boundary == 0.9
        assert open_checkpoint(there / OURS[1]).layout == form.replace("original", "safetensors")
        mm_convert("convert", there, back, "--to", "diffusers")
        assert {path.name for path in back.iterdir()} == {*DIFFUSERS, "model_index.json"}
        index = json.loads((back / "model_index.json").read_text())
        assert index["boundary_ratio"] == 0.9
        assert index["_class_name"] == "WanImageToVideoPipeline"
        same(pair, there)
        same(pair, back)


def test_diffusers_opens_what_is_written(toys, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    for name in OURS:
        toys.diffusers(tmp_path / "published" / name)
    mm_convert("convert", tmp_path / "published", tmp_path / "out", "--to", "diffusers", "--boundary", "0.875")
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", **nothing)
    assert isinstance(pipeline, diffusers.WanPipeline)
    assert pipeline.config.boundary_ratio == 0.875
    for model, name in ((pipeline.transformer, OURS[0]), (pipeline.transformer_2, OURS[1])):
        (file,) = (tmp_path / "published" / name).glob("*.safetensors")
        bias = bytes(read_file(file)[0]["proj_out.bias"].read())
        assert model.proj_out.bias.detach().numpy().tobytes() == bias


def test_a_boundary_that_nobody_says(pair, tmp_path, capsys):
    (pair / "model_index.json").unlink()
    mm_convert("convert", pair, tmp_path / "out")
    assert "the boundary is not known, so it is not written: give --boundary" in capsys.readouterr().err
    assert not (tmp_path / "out/experts.json").exists()
    mm_convert("convert", pair, tmp_path / "said", "--boundary", "0.8")
    assert open_experts(tmp_path / "said").boundary == 0.8
    with pytest.raises(SystemExit, match=r"says boundary 0\.8, not 0\.9"):
        mm_convert("convert", tmp_path / "said", tmp_path / "other", "--boundary", "0.9")
    with pytest.raises(SystemExit, match=r"^2$"):
        mm_convert("convert", pair, tmp_path / "other", "--boundary", "875")
    assert "--boundary is 875" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="is not two experts, so it has no boundary"):
        mm_convert("convert", pair / "transformer", tmp_path / "other", "--boundary", "0.9")


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        (WAN, "wan2.2-t2v-a14b", 0.875),
        (WAN, "wan2.2-i2v-a14b", 0.9),
        (VACE, "vace-a14b", 0.875),
        (WAN, "wan2.2-ti2v-5b", None),
    ],
)
def test_the_boundaries_of_published_pairs(family, name, expected):
    found = published_boundary(family, family.presets[name])
    assert found == ((expected, name) if expected else (None, ""))


def test_inspect(pair, tmp_path, capsys):
    mm_convert("inspect", pair)
    out = capsys.readouterr().out
    assert "what           two experts\nboundary       0.9\n" in out
    assert out.count("num_heads      2") == 2
    for name in DIFFUSERS:
        assert f"\n{pair / name}\n" in out


def test_adapters_travel_together(tmp_path, capsys):
    for scale, name in enumerate(OURS, 1):
        adapter(tmp_path / "pair" / name, float(scale))
    one_folder = ("lora_high_noise.safetensors", "lora_low_noise.safetensors")  # of ComfyUI: so two names
    for form, files in (("comfyui", one_folder), ("diffusers", ("pytorch_lora_weights.safetensors",) * 2)):
        there, back = tmp_path / form, tmp_path / f"back-{form}"
        mm_convert("convert", tmp_path / "pair", there, "--to", form, "--boundary", "0.875")
        names = DIFFUSERS if form == "diffusers" else OURS
        assert {path.name for path in there.iterdir()} == {*names, "experts.json"}
        assert all((there / name / file).is_file() for name, file in zip(names, files, strict=True))
        mm_convert("convert", there, back)
        assert open_experts(back).boundary == 0.875
        for name in OURS:
            (before,), (after,) = (
                (tmp_path / "pair" / name).glob("*.safetensors"),
                (back / name).glob("*.safetensors"),
            )
            ours, theirs = ({n: bytes(t.read()) for n, t in read_file(file)[0].items()} for file in (before, after))
            assert ours == theirs
    capsys.readouterr()
    mm_convert("inspect", tmp_path / "pair")
    out = capsys.readouterr().out
    assert "two experts, LoRA adapters" in out
    assert out.count("rank, alpha    2, 3") == 2


def test_adapters_are_merged_into_both(pair, tmp_path):
    torch = pytest.importorskip("torch")
    for scale, name in enumerate(OURS, 1):
        adapter(tmp_path / "loras" / name, float(scale))
    mm_convert("convert", pair, tmp_path / "each", "--lora", tmp_path / "loras")
    mm_convert("convert", pair, tmp_path / "both", "--lora", tmp_path / "loras" / OURS[0], "--to", "diffusers")
    base, each, both = (open_experts(tmp_path / name) for name in ("pair", "each", "both"))
    assert (each.boundary, both.boundary) == (0.9, 0.9)
    name = "blocks.0.self_attn.q.weight"
    for i, scale in enumerate((1, 2)):
        expected = open_checkpoint(base[i])[name] + 1.5 * 2 * scale**2  # alpha/rank, and sums of two products
        torch.testing.assert_close(open_checkpoint(each[i])[name], expected, equal_nan=True)
    assert any(diff(each.low, both.low))
    assert not any(diff(each.high, both.high))


@pytest.mark.parametrize("prefix", ["transformer_2.", "pipe.dit2."])
def test_an_adapter_for_low_noise_is_not_merged_into_the_other_expert(prefix, pair, tmp_path):
    adapter(tmp_path / "plain", 1.0)
    file, low = tmp_path / "plain/adapter_model.safetensors", tmp_path / "low.safetensors"
    ours = read_file(file)[0]
    write_file(
        low, {n.replace("base_model.model.", prefix): t for n, t in ours.items()}, {"alpha": "3"}, lambda done: None
    )
    with pytest.raises(SystemExit, match="is for the expert for low noise, as its names say"):
        mm_convert("convert", pair, tmp_path / "merged", "--lora", low)
    with pytest.raises(ValueError, match="is for the expert for low noise"):
        open_lora(low, expert="high")
    assert open_lora(low, expert="low").expert == "low"
    mm_convert("convert", pair / DIFFUSERS[1], tmp_path / "merged", "--lora", low)


def test_two_files_in_a_folder_are_told_apart(tmp_path):
    for scale, name in enumerate(OURS, 1):
        adapter(tmp_path / name, float(scale))
    folder = tmp_path / "loras"
    folder.mkdir()
    names = ("Motion_HIGH_fp16.safetensors", "Motion_LOW_fp16.safetensors")
    for expert, name in zip(OURS, names, strict=True):
        (tmp_path / expert / "adapter_model.safetensors").rename(folder / name)
    for command in (("inspect",), ("convert",)):
        with pytest.raises(SystemExit) as error:
            mm_convert(*command, folder, *([tmp_path / "out"] if "convert" in command else []))
        message = str(error.value)
        assert (
            f"{names[0]} for high noise and {names[1]} for low noise: name one of them ({folder / names[0]})" in message
        )
        assert f"put them into {folder / OURS[0]} and {folder / OURS[1]}" in message
    for expert, name in zip(OURS, names, strict=True):  # what the message says
        (folder / expert).mkdir()
        (folder / name).rename(folder / expert / name)
    mm_convert("convert", folder, tmp_path / "out")
    assert open_experts(tmp_path / "out")


def test_what_is_no_pair(pair, toys, tmp_path):
    mixed = tmp_path / "mixed"
    toys.diffusers(mixed / OURS[0])
    adapter(mixed / OURS[1], 1.0)
    toys.diffusers(tmp_path / "unlike" / OURS[0])
    toys.diffusers(tmp_path / "unlike" / OURS[1], "wide")
    toys.diffusers(tmp_path / "half" / OURS[1])
    for command in (("inspect",), ("convert",)):
        for name, message in {
            "mixed": "one is a whole model and the other a LoRA adapter",
            "unlike": "are no pair: they have in_channels 16 and 36",
            "half": "holds one expert of two: high_noise_model/, the one for high noise, is missing",
        }.items():
            with pytest.raises(SystemExit, match=message):
                mm_convert(*command, tmp_path / name, *([tmp_path / "out"] if "convert" in command else []))
    with pytest.raises(SystemExit, match=r"one file, and .*pair holds two experts"):
        mm_convert("convert", pair, tmp_path / "out.safetensors")
    with pytest.raises(SystemExit, match=r"is the source; .*convert each expert in place: .*transformer"):
        mm_convert("convert", pair, pair)
    assert not (tmp_path / "out").exists()


def test_a_target_appears_whole(pair, tmp_path, capsys):
    mm_convert("convert", pair, tmp_path / "out", "--dry_run")
    out = capsys.readouterr().out
    assert all(f"{tmp_path / 'out' / name}" in out for name in (*OURS, "experts.json"))
    assert not (tmp_path / "out").exists()
    mm_convert("convert", pair, tmp_path / "out", "--sha256")
    assert "sha256" in json.loads((tmp_path / "out" / OURS[1] / "mm_convert.json").read_text())
    with pytest.raises(SystemExit, match="exists; name another target, or replace it with --overwrite true"):
        mm_convert("convert", pair, tmp_path / "out")
    (tmp_path / "out/notes.txt").touch()
    with pytest.raises(SystemExit, match=r"notes\.txt, which is no part"):
        mm_convert("convert", pair, tmp_path / "out", "--overwrite")
    (tmp_path / "out/notes.txt").unlink()
    mm_convert("convert", pair, tmp_path / "out", "--overwrite")
    same(pair, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"pair", "out"}, "nothing hidden is left"

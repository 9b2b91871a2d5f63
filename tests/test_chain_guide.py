"""MindSpeed-MM's guide of Open-Sora-Plan on toy files, in real processes: convert, train, merge, and back."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mm_convert import diff, open_checkpoint
from mm_data import FeatureCache
from mm_models import build
from mm_models.families import family_of
from mm_models.opensoraplan.testing_vae import VAEConfig, write_vae

SMALL = {"dim": 48, "num_heads": 4, "num_layers": 3, "ffn_dim": 96, "text_dim": 16}
PUBLISHED = {  # the config.json of a released folder, in its own words
    "_class_name": "OpenSoraT2V",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 12,
    "caption_channels": 16,
    "cross_attention_dim": 48,
    "in_channels": 4,
    "interpolation_scale_h": 1.0,
    "interpolation_scale_t": 1.0,
    "interpolation_scale_w": 1.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 4,
    "num_layers": 3,
    "out_channels": 4,
    "patch_size": 2,
    "patch_size_t": 1,
    "sample_size": [4, 6],
    "sample_size_t": 2,
    "use_rope": True,
}
GUIDE = 'python -m mm_convert.convert_ckpt_to_mm   --mode="split" --tp-size=2'  # its spaces and quotes too
RELEASED = Path("raw_ckpt/open-sora-plan/93x480p")
CONVERTED = Path("ckpt/open-sora-plan-12/93x480p")


def run(place: Path, command: str) -> None:
    program, *words = shlex.split(command)
    assert program == "python"
    done = subprocess.run([sys.executable, *words], cwd=place, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]


def train(place: Path, name: str, weights: Path, ranks: int = 1, *flags: str) -> list[dict]:
    """The rows of metrics of a run that starts from these weights."""
    settings = ["--model", "opensoraplan-tiny", "--architecture", json.dumps(SMALL), "--dtype", "float32"]
    settings += ["--weights", str(weights), "--data.features", "features", "--data.global_batch", "2"]
    settings += ["--optim.lr", "1e-3", "--data.text_dropout", "0.3", "--steps", "2", "--output", name, *flags]
    start = "-m torch.distributed.run --standalone --nproc_per_node 2 " if ranks == 2 else ""
    run(place, f"python {start}-m mm_train {shlex.join(settings)}")
    lines = (place / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Released files where the guide has them, features, and a run from the released folder on one rank."""
    place = tmp_path_factory.mktemp("guide")
    model = build("opensoraplan-tiny", device="cpu", **SMALL)
    start = family_of(model.config).start()
    tensors = {name: start.initial(name, p.shape, seed=0) for name, p in model.named_parameters()}
    (place / RELEASED).mkdir(parents=True)
    save_file(tensors, place / RELEASED / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (place / RELEASED / "config.json").write_text(json.dumps(PUBLISHED), encoding="utf-8")
    write_vae(place / "raw_ckpt/open-sora-plan/vae", VAEConfig(hidden_size=32))

    draw = torch.Generator().manual_seed(0)
    with FeatureCache(place / "features") as cache:
        for i in range(4):
            sample = {"latents": torch.randn(4, 2, 4, 6, generator=draw)}
            sample["text.0"] = torch.randn(3 + i, 16, generator=draw)
            cache.put(f"{i:064d}", sample, {"id": f"{i}.mp4"})
        cache.put_empty_text(torch.randn(1, 16, generator=draw))
        cache.finish()
    return place


@pytest.fixture(scope="module")
def expected(place):
    return train(place, "released", RELEASED)


@pytest.mark.long
def test_the_guide(place, expected):
    """Split for two ranks, train on two ranks from what was written, merge, and go back to the released names."""
    run(place, GUIDE)
    assert (place / "ckpt/vae").is_dir()
    assert sorted(file.name for file in (place / CONVERTED).iterdir()) != []
    found = train(place, "split", CONVERTED, 2, "--parallel.tp", "2")
    compare(found, expected)
    run(place, "python -m mm_convert.convert_ckpt_to_mm --mode merge --tp-size 2")
    run(place, "python -m mm_convert convert ckpt/open-sora-plan-12/merge back --to original")
    file = "diffusion_pytorch_model.safetensors"
    assert not any(diff(place / "back", place / RELEASED))
    said = json.loads((place / "back/config.json").read_text(encoding="utf-8"))
    assert {name: said[name] for name in PUBLISHED} == PUBLISHED
    assert (place / "back" / file).exists()


@pytest.mark.long
def test_mindspeed_mms_own_tree(place, expected):
    """What its own script would have written: two ranks' slices, in its names; and what two of our ranks trained."""
    target = "ckpt/tree"
    run(place, f"{GUIDE} --target-layout mindspeed --dit-mm-save-path {target} --vae-convert False")
    tree = open_checkpoint(place / target)
    assert (tree.layout, tree.split["tp"]) == ("mindspeed", 2)
    compare(train(place, "tree", Path(target), 2, "--parallel.tp", "2"), expected)
    merge = f"--mode merge --tp-size 2 --dit-mm-weight-path {target} --dit-merge-save-path ckpt/tree-merged"
    run(place, f"python -m mm_convert.convert_ckpt_to_mm {merge}")
    assert not any(diff(place / "ckpt/tree-merged", place / RELEASED))
    run(place, "python -m mm_convert convert tree/weights trained --to original")
    one, two = open_checkpoint(place / "released/weights"), open_checkpoint(place / "trained")
    assert (two.dialect, set(one)) == ("original", set(two))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4  # of steps of 1e-3
    moved = open_checkpoint(place / RELEASED)
    assert max((moved[name] - one[name]).abs().max().item() for name in one) > 1e-3


def compare(found: list[dict], expected: list[dict]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [1, 2]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)

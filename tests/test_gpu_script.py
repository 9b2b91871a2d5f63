"""What the first GPU hour will run, tried on this CPU: every part in small, failures, hangs, and going on."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MEASURE = Path(__file__).parents[1] / "docs" / "measure"
sys.path.insert(0, str(MEASURE))

import gpu  # noqa: E402

PARTS = "kernels,steps,qwen,estimate"  # compiling, encoders and a run of mm_train take longer


def run(out: Path, *more: str, code: int = 0) -> str:
    command = [sys.executable, str(MEASURE / "gpu.py"), "--tiny", "--out", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    run(out, "--parts", PARTS)
    return out


def test_every_case_of_the_parts_is_measured(results):
    found = {row["name"]: row for row in rows(results)}
    wanted = [name for part in PARTS.split(",") for name in gpu.cases(part, "")]
    assert list(found) == wanted
    assert not [row for row in found.values() if "error" in row or "not run" in row or row.get("right") is False]
    losses = {row["loss"] for name, row in found.items() if row["part"] == "steps" and name.startswith("ours")}
    assert max(losses) - min(losses) < 1e-6  # recompute and offload change nothing
    ours, theirs = (found[f"Qwen2.5-VL-3B, {whose}"]["loss"] for whose in ("ours", "transformers"))
    assert ours == pytest.approx(theirs, rel=2e-3)  # the same weights, and the same conversations
    table = (results / "table.md").read_text(encoding="utf-8")
    assert "| ours, all but attention recomputed | " in table


def test_a_second_call_makes_only_what_is_missing(results):
    before = rows(results)
    kept = [row for row in before if row["name"] != "kernel math"]
    (results / "gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    run(results, "--parts", PARTS)
    assert [row["name"] for row in rows(results)] == [*(row["name"] for row in kept), "kernel math"]


def test_a_case_that_fails_or_hangs_costs_only_itself(tmp_path, monkeypatch, capsys):
    """In a copy of the script, of which a kernel hangs, one kills its process, one needs what is not here."""
    text = (MEASURE / "gpu.py").read_text(encoding="utf-8")
    broken = """
def kernel(tiny, backend):
    if backend == "torch":
        import no_such_package
    if backend == "cpu":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def fill("""
    assert text.count("\ndef fill(") == 1
    text = text.replace("\ndef fill(", broken).replace(
        "ROOT = Path(__file__).parent.parent.parent", f"ROOT = Path({str(MEASURE.parents[1])!r})"
    )
    script = tmp_path / "gpu.py"
    script.write_text(text, encoding="utf-8")
    monkeypatch.setattr(gpu, "__file__", str(script))
    gpu._asked.clear()
    out = tmp_path / "out"
    out.mkdir()
    args = argparse.Namespace(out=str(out), wheels=None, tiny=True)
    for names, limit in ((["kernel torch", "kernel cpu"], 600), (["kernel math"], 5)):
        monkeypatch.setattr(gpu, "list_cases", lambda part, args, names=names: names)
        gpu.attempt("kernels", args, limit)
    found = {row["name"]: row for row in rows(out)}
    assert found["kernel torch"]["not run"] == "needs no_such_package"
    assert "ended with -9" in found["kernel cpu"]["error"]
    assert "no result within" in found["kernel math"]["error"]
    assert "- not run: kernel torch: needs no_such_package" in gpu.table(list(found.values()))
    assert not any(map(gpu.is_done, found.values()))  # the package may be carried the next time
    gpu._asked.clear()


def test_the_machine_is_described_and_the_model_is_right_on_it():
    assert gpu.about(True)["copy, TB/s"] > 0
    assert gpu.packages(True)["attention auto"] == "cpu"
    assert gpu.parity(True)["right"]


def test_a_kernel_that_is_not_here_has_not_failed(tmp_path, monkeypatch):
    """Its package is missing, or torch refuses the call."""

    def loads(tiny: bool) -> dict:
        with gpu.loaded("flash4"):
            return {}

    def refused(tiny: bool) -> dict:
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.CUDNN_ATTENTION]):
            torch.nn.functional.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 8, 8))
        return {}

    monkeypatch.setattr(gpu, "cases", lambda part, out: {"flash4": (loads, ()), "cudnn": (refused, ())})
    gpu.work("exactness", ["flash4", "cudnn"], tmp_path, True)
    missing, refusal = (row["not run"] for row in rows(tmp_path))
    assert missing == "needs flash_attn"
    assert refusal.startswith("torch refuses it: No viable backend")


def test_the_limits_are_eight_minutes_together():
    assert sum(gpu.PARTS.values()) <= 480
    assert all(gpu.cases(part, "") for part in gpu.PARTS)


def test_wheels_of_ours_are_found_and_used(tmp_path):
    """From a folder that is no checkout: the packages come from wheels alone."""
    subprocess.run([sys.executable, str(MEASURE / "gpu_wheels.py"), str(tmp_path / "wheels")], check=True, timeout=60)
    (tmp_path / "gpu.py").write_text((MEASURE / "gpu.py").read_text(encoding="utf-8"), encoding="utf-8")
    names = {wheel.name.split("-")[0] for wheel in (tmp_path / "wheels").glob("*.whl")}
    assert {"einops", "diffusers", "tensorboard", "mm_parallel", "mm_models", "mm_train"} <= names
    script = "import gpu, sys, pathlib; gpu.find_packages('wheels', pathlib.Path('out')); import mm_parallel, einops; "
    script += "print(mm_parallel.__file__, einops.__file__); import tensorboard; "
    script += "from google.protobuf.internal import api_implementation; print(api_implementation.Type())"
    bare = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, '.'); {script}"]
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("out/packages/") == 2, done.stderr
    assert done.stdout.endswith("python\n")  # protobuf without what is compiled
    wheel = next((tmp_path / "wheels").glob("mm_parallel-*.whl"))
    os.utime(wheel, (1, 1))  # as if it had been made again
    again = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout.splitlines()[0].split()[0] != done.stdout.splitlines()[0].split()[0], again.stderr

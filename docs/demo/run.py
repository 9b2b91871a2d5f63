"""From mp4 files to generated videos, by the commands that a user types: `hatch run demo`.

Writes clips of moving shapes, encodes them, trains a small Wan2.1 on them, converts it to diffusers' format, generates
the combinations that were held out, measures what came out, and shows it all in demo-out/report.html. Every step can
be repeated alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.insert(0, str(HERE))

from report import write_report  # noqa: E402

from mm_data import made_with  # noqa: E402

COMMANDS = {
    "Write clips": "python {here}/clips.py {out}/clips --repeats {repeats}",
    "Assemble VAE and text encoder": "python {here}/text.py {out}/encoders",
    "Encode clips and captions": (
        "python -m mm_train.extract --model wan-tiny --encoders {out}/encoders --config {here}/extract.toml"
        " --data.manifest {out}/clips/data.txt --output {out}/features"
    ),
    "Encode the validation set": (
        "python -m mm_train.extract --model wan-tiny --encoders {out}/encoders --config {here}/extract.toml"
        " --data.manifest {out}/clips/validation.txt --output {out}/validation"
    ),
    "Train": (
        "python -m mm_train --model wan-tiny --weights random --config {here}/train.toml --data.features {out}/features"
        " --validation.features {out}/validation --sample.encoders {out}/encoders --output {out}/run"
    ),
    "Convert to diffusers' format": (
        "mm-convert WanConverter mm_to_hf --cfg.source_path {out}/run/weights-ema --cfg.target_path {out}/transformer"
    ),
    "Generate what was held out": (
        "python -m mm_infer --weights {out}/transformer --encoders {out}/encoders --config {here}/generate.toml"
        " --prompt_file {out}/clips/held_out.txt --output {out}/generated"
    ),
    "Measure": "python {here}/measure.py {out}/generated {out}/clips/held_out.txt --json {out}/scores.json",
}

# Half the cores: threads that wait for a core spin, which is slow on a machine that does something else as well.
ENVIRONMENT = {"OMP_NUM_THREADS": str(min(4, max(1, (os.cpu_count() or 2) // 2)))} | os.environ


def run(name: str, command: str) -> float:
    """Seconds that the command took; its output goes through. Ends the demo if it fails."""
    print(f"\n== {name}\n$ {command}", flush=True)
    program, *rest = shlex.split(command)
    installed = Path(sys.executable).with_name(program)  # of this environment, whether it is active or not
    started = time.perf_counter()
    code = subprocess.run([installed, *rest], env=ENVIRONMENT).returncode
    if code:
        sys.exit(f"error: '{name}' ended with code {code}; its command is shown above")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-out"))
    parser.add_argument("--repeats", type=int, default=4, help="clips of each combination that is trained on")
    parser.add_argument("--steps", type=int, help="training steps, instead of those in train.toml")
    options = parser.parse_args()
    out = options.output
    if out.exists() and any(out.iterdir()) and not (out / "clips").exists():
        sys.exit(f"error: {out} is not an earlier demo, so it is not replaced: choose another --output")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    stages = []
    for name, command in COMMANDS.items():
        command = command.format(here=shlex.quote(str(HERE)), out=shlex.quote(str(out)), repeats=options.repeats)
        if name == "Train" and options.steps:
            command += f" --steps {options.steps} --optim.warmup 0"
        stages.append((name, run(name, command), command))

    scores = json.loads((out / "scores.json").read_text())
    samples = sorted((out / "run/samples").glob("step-*/000.mp4"))
    write_report(
        out / "report.html",
        metrics=out / "run/metrics.jsonl",
        generated=[(Path(clip["file"]), clip["prompt"], clip["right"]) for clip in scores["clips"]],
        progress=[(f"{made_with(path)['prompt']}, step {made_with(path)['step']}", path) for path in samples],
        scores=scores["totals"],
        stages=stages,
    )
    minutes = sum(seconds for _, seconds, _ in stages) / 60
    print(f"\nDone in {minutes:.1f} minutes. Open {(out / 'report.html').resolve()}")


if __name__ == "__main__":
    main()

"""From mp4 files to generated videos, by the commands that a user types: `hatch run demo`.

Writes clips of moving shapes, encodes them, trains a small Wan2.1 on them, converts it to diffusers' format,
generates the combinations that were held out, measures what came out, and shows it all in demo-out/report.html. Every
step can be repeated alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from report import write_report  # noqa: E402

PROMPT_SHOWN_WHILE_TRAINING = "a red circle moving left"


class Stages:
    """Runs commands, lets their output through, and remembers what they were and how long they took."""

    def __init__(self) -> None:
        self.done: list[tuple[str, float, str]] = []

    def run(self, name: str, *command: str | Path) -> None:
        words = [str(word) for word in command]
        text = shlex.join(["python" if word == sys.executable else word for word in words])
        print(f"\n\033[1m{name}\033[0m\n$ {text}", flush=True)
        started = time.perf_counter()
        code = subprocess.run(words).returncode
        if code:
            sys.exit(f"error: '{name}' ended with code {code}; the command is shown above")
        self.done.append((name, time.perf_counter() - started, text))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path, default=Path("demo-out"))
    options.add_argument("--steps", type=int, default=0, help="training steps (default: those of the recipe)")
    asked = options.parse_args()
    out: Path = asked.output
    if out.exists() and not (out / "clips").exists() and any(out.iterdir()):
        sys.exit(f"error: {out} exists and is not an earlier demo: choose another --output")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    stages, python = Stages(), sys.executable
    stages.run("Write clips", python, HERE / "clips.py", out / "clips")
    stages.run("Assemble VAE and text encoder", python, HERE / "text.py", out / "encoders")
    for name, manifest in (("features", "data"), ("validation", "validation")):
        stages.run(
            f"Encode clips and captions ({name})",
            *(python, "-m", "mm_train.extract", "--model", "wan-tiny", "--encoders", out / "encoders"),
            *(
                "--data.manifest",
                out / f"clips/{manifest}.txt",
                "--output",
                out / name,
                "--config",
                HERE / "extract.toml",
            ),
        )
    stages.run(
        "Train",
        *(
            python,
            "-m",
            "mm_train",
            "--model",
            "wan-tiny",
            "--weights",
            "random",
            "--output",
            out / "run",
            "--config",
            HERE / "train.toml",
        ),
        *("--data.features", out / "features", "--validation.features", out / "validation"),
        *("--sample.encoders", out / "encoders", "--sample.prompts", f'["{PROMPT_SHOWN_WHILE_TRAINING}"]'),
        *(("--steps", str(asked.steps)) if asked.steps else ()),
    )
    stages.run(
        "Convert to diffusers' format",
        *(
            "mm-convert",
            "WanConverter",
            "mm_to_hf",
            "--cfg.source_path",
            out / "run/weights-ema",
            "--cfg.target_path",
            out / "transformer",
        ),
    )
    stages.run(
        "Generate the held-out combinations",
        *(python, "-m", "mm_infer", "--weights", out / "transformer", "--encoders", out / "encoders"),
        *(
            "--prompt_file",
            out / "clips/held_out.txt",
            "--output",
            out / "generated",
            "--config",
            HERE / "generate.toml",
        ),
    )
    stages.run(
        "Measure",
        python,
        HERE / "measure.py",
        out / "generated",
        out / "clips/held_out.txt",
        "--json",
        out / "scores.json",
    )

    scores = json.loads((out / "scores.json").read_text())
    clips = [(Path(c["file"]), c["prompt"], c["right"]) for c in scores["clips"]]
    grown = [
        (f"after {int(p.parent.name.removeprefix('step-'))} steps", p)
        for p in sorted((out / "run/samples").glob("step-*/000.mp4"))
    ]
    write_report(
        out / "report.html",
        metrics=out / "run/metrics.jsonl",
        generated=clips,
        progress=grown,
        scores=scores["totals"],
        stages=stages.done,
    )
    total = sum(seconds for _, seconds, _ in stages.done)
    print(f"\nDone in {total / 60:.1f} minutes. Open {(out / 'report.html').resolve()}")


if __name__ == "__main__":
    main()

"""From mp4 files to generated videos, by the commands that a user types: `hatch run demo`.

Writes clips of moving shapes, encodes them, trains a small Wan2.1 on them, converts it to diffusers' format, generates
the combinations that were held out, measures what came out, and shows it all in demo-out/report.html. Every step can
be repeated alone. With --task, the same for videos that are made from images, masked videos and references, and for a
small Qwen2.5-VL that answers questions: tasks.py says how.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.insert(0, str(HERE))

from report import write_report  # noqa: E402
from tasks import DEMOS, Demo  # noqa: E402

from mm_data import made_with  # noqa: E402

# Half the cores: threads that wait for a core spin, which is slow on a machine that does something else as well.
ENVIRONMENT = {"OMP_NUM_THREADS": str(min(4, max(1, (os.cpu_count() or 2) // 2)))} | os.environ


PAGE = "weights|encoders|lora|processor|model|config|task"
"""Flags that say which model is asked, and how."""


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


def show(out: Path, demo: Demo, stages: list[tuple[str, float, str]]) -> None:
    """Write the report of what lies in `out`; stages are (name, seconds, command)."""
    samples = sorted((out / demo.runs[-1]).glob("samples/step-*/000.mp4"))
    write_report(
        out / "report.html",
        title=demo.title,
        told=demo.told,
        metrics=[out / folder / "metrics.jsonl" for folder in demo.runs],
        scores={name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in demo.scores},
        progress=[(f"{made_with(path)['prompt']}, step {made_with(path)['step']}", path) for path in samples],
        stages=stages,
        pages=page_commands(out, demo, [command for _, _, command in stages]),
    )


def page_commands(out: Path, demo: Demo, commands: list[str]) -> list[str]:
    """What opens the pages of what was made: of the model, as its first command asks it, and of its runs."""
    asked = next(command for command in commands if "-m mm_infer" in command)
    kept = re.findall(rf" --(?:{PAGE}) (?:'[^']*'|\S+)", asked)
    made = shlex.quote(str(out / "page"))
    runs = shlex.join(str(out / run) for run in demo.runs)
    return [f"python -m mm_infer.page{''.join(kept)} --output {made}", f"python -m mm_train.page {runs}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=DEMOS, default="t2v", help="what the model is to learn")
    parser.add_argument("--output", type=Path, default=Path("demo-out"))
    parser.add_argument("--repeats", type=int, default=4, help="clips of each combination, or times 300 of a question")
    parser.add_argument("--steps", type=int, help="training steps of each run, instead of what it has")
    options = parser.parse_args()
    out, demo = options.output, DEMOS[options.task]
    if out.exists() and any(out.iterdir()) and not any((out / name).exists() for name in ("clips", "questions")):
        sys.exit(f"error: {out} is not an earlier demo, so it is not replaced: choose another --output")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    stages = []
    for name, command in demo.commands.items():
        command = command.format(here=shlex.quote(str(HERE)), out=shlex.quote(str(out)), repeats=options.repeats)
        if "-m mm_train " in command and options.steps:
            command += f" --steps {options.steps} --optim.warmup 0"
        stages.append((name, run(name, command), command))

    show(out, demo, stages)
    minutes = sum(seconds for _, seconds, _ in stages) / 60
    print(f"\nDone in {minutes:.1f} minutes. Open {(out / 'report.html').resolve()}")


if __name__ == "__main__":
    main()

"""Are the answers right? Compares them with what the questions' file says, for each kind of question.

    python docs/demo/answers.py questions/held_out.json answers.jsonl --json scores.json

An answer must be the one that is wanted, letter by letter. A box is right where it and the wanted one share at least
half of the area that they cover together.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np

LEAST_OVERLAP = 0.5  # intersection over union
BOX = re.compile(r"\[(\d+), (\d+), (\d+), (\d+)\]")

Box = tuple[int, int, int, int]


def read_box(text: str) -> Box | None:
    """x1 y1 x2 y2, if the whole text is a box."""
    found = BOX.fullmatch(text.strip())
    return found and tuple(map(int, found.groups()))


def overlap(one: Box, other: Box) -> float:
    """Intersection over union; 0 for a box without an area."""
    (ax, ay, bx, by), (cx, cy, dx, dy) = one, other
    shared = max(0, min(bx, dx) - max(ax, cx)) * max(0, min(by, dy) - max(ay, cy))
    areas = [max(0, right - left) * max(0, bottom - top) for left, top, right, bottom in (one, other)]
    return shared / (sum(areas) - shared) if min(areas) else 0.0


def judge(answer: str, wanted: str) -> tuple[bool, float | None]:
    """(whether it is right, the overlap of its box where one is wanted)"""
    if (box := read_box(wanted)) is None:
        return answer.strip() == wanted.strip(), None
    shared = overlap(found, box) if (found := read_box(answer)) else 0.0
    return shared >= LEAST_OVERLAP, shared


def measure(questions: Path, answers: Path) -> dict:
    """{"answers": [{kind, images, videos, said, answer, wanted, overlap, right}], "totals": share that is right of
    each kind, and of all}. `said` are the turns before the answer. ValueError where a question has no answer.
    """
    entries = json.loads(questions.read_text(encoding="utf-8"))
    given = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    if len(entries) != len(given):
        raise ValueError(f"{questions} asks {len(entries)} questions, and {answers} has {len(given)} answers")
    rows = []
    for entry, one in zip(entries, given, strict=True):
        right, shared = judge(one["answer"], one["reference"])
        files = {name: [str(questions.parent / path) for path in entry[name]] for name in ("images", "videos")}
        said = [message["content"] for message in entry["messages"][:-1]]
        row = {"kind": entry["kind"], **files, "said": said, "answer": one["answer"], "wanted": one["reference"]}
        rows.append(row | {"overlap": shared, "right": right})
    kinds = dict.fromkeys(row["kind"] for row in rows)
    totals = {kind: float(np.mean([row["right"] for row in rows if row["kind"] == kind])) for kind in kinds}
    return {"answers": rows, "totals": totals | {"all": float(np.mean([row["right"] for row in rows]))}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("answers", type=Path, help="what mm_infer.chat wrote")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    options = parser.parse_args()
    result = measure(options.questions, options.answers)
    for kind, share in result["totals"].items():
        print(f"{kind:16} {100 * share:3.0f} % right")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

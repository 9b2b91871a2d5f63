"""One HTML file that opens from disk: curves, prompts beside their videos, timings, commands. Everything is inside
it.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from answers import read_box
from PIL import Image

Points = Sequence[tuple[float, float]]

COLUMNS = {"image": "image", "video": "source", "mask": "mask", "references": "reference"}  # by mm_infer's names
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { font-weight: 600 } pre { background: #f4f4f4; padding: .7rem; white-space: pre-wrap; font-size: 13px }
table { border-collapse: collapse }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-size: 13px }
video, img { width: 100%; image-rendering: pixelated; background: #000 } .given video, .given img { width: 8rem }
.shown { position: relative; display: inline-block; width: 8rem; margin-right: .3rem }
.shown svg { position: absolute; inset: 0; width: 100% } .shown video, .shown img { display: block }
rect { fill: none; stroke-width: 1.2 } rect.given { stroke: #17803d } rect.answered { stroke: #e0262d }
.yes { color: #17803d } .no { color: #c0262d } svg text { font-size: 11px; fill: #666 }
"""


def chart(title: str, points: Points, faint: Points = ()) -> str:
    """A line chart as SVG; `faint` is drawn lighter behind it, on the same axes."""
    if len(points) < 2:
        return ""
    width, height, left, bottom = 640, 220, 50, 24
    xs, ys = zip(*points, *faint, strict=True)
    x0, x1, y0, y1 = min(xs), max(xs), min(0.0, *ys), max(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - 10),
            height - bottom - (y - y0) / (y1 - y0 or 1) * (height - bottom - 10),
        )

    def line(series: Points, colour: str) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in series))
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'

    ticks = "".join(
        f'<text x="{left - 6}" y="{place(x0, y)[1] + 4:.1f}" text-anchor="end">{y:.2g}</text>'
        f'<line x1="{left}" x2="{width - 10}" y1="{place(x0, y)[1]:.1f}" y2="{place(x0, y)[1]:.1f}" stroke="#eee"/>'
        for y in (y0 + (y1 - y0) * k / 4 for k in range(5))
    ) + "".join(
        f'<text x="{place(x, y0)[0]:.1f}" y="{height - 6}" text-anchor="end">{x:.0f}</text>'
        for x in (x0 + (x1 - x0) * k / 4 for k in range(5))
    )
    drawn = line(faint, "#c9d6ea") + line(points, "#2458a6")
    return f'<h3>{html.escape(title)}</h3><svg viewBox="0 0 {width} {height}" width="{width}">{ticks}{drawn}</svg>'


def smooth(points: Points, weight: float = 0.95) -> list[tuple[float, float]]:
    """Exponential moving average, so that the trend can be seen in the noise."""
    result, average = [], points[0][1] if points else 0.0
    for x, y in points:
        average = weight * average + (1 - weight) * y
        result.append((x, average))
    return result


def picture(path: Path) -> str:
    """A video or an image, with its bytes."""
    data = base64.b64encode(path.read_bytes()).decode()
    if path.suffix == ".mp4":
        return f'<video autoplay loop muted playsinline src="data:video/mp4;base64,{data}"></video>'
    return f'<img src="data:image/png;base64,{data}">'


def marks(right: dict[str, bool]) -> str:
    return " ".join(
        f'<span class="{"yes" if good else "no"}">{"✓" if good else "✗"} {name}</span>' for name, good in right.items()
    )


def figure(path: Path, caption: str, right: dict[str, bool] | None = None) -> str:
    """A clip with its prompt, and where it was measured, which attributes are as asked."""
    return f"<figure>{picture(path)}<figcaption>{html.escape(caption)}<br>{marks(right or {})}</figcaption></figure>"


def generated(scores: dict) -> str:
    """What measure.py looked at: clips with their prompts; or where they were made from more, all that side by side."""
    rows = scores["clips"]
    if not any(row["given"] for row in rows):
        figures = "".join(figure(Path(row["file"]), row["prompt"], row["right"]) for row in rows)
        return f'<div class="clips">{figures}</div>'
    columns = [name for name in COLUMNS if name in rows[0]["given"]]
    heads = "".join(f"<th>{head}</th>" for head in ["prompt", *(COLUMNS[name] for name in columns), "result", ""])
    lines = []
    for row in rows:
        cells = ["".join(picture(Path(path)) for path in row["given"][name]) for name in columns]
        cells = [html.escape(row["prompt"]), *cells, picture(Path(row["file"])), verdict(row)]
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="given"><tr>{heads}</tr>{body}</table>'


def answered(scores: dict) -> str:
    """What answers.py looked at: for each kind of question a table of what was shown, said, answered and wanted."""
    parts = []
    for kind, share in scores["totals"].items():
        rows = [row for row in scores["answers"] if row["kind"] == kind]
        if rows:
            body = "".join(_answered_row(row) for row in rows)
            heads = "<tr><th></th><th>question</th><th>answer</th><th>wanted</th></tr>"
            summary = f"{html.escape(kind)}: {100 * share:.0f} % of {len(rows)} are right"
            table = f'<table class="given">{heads}{body}</table>'
            parts.append(f"<details open><summary>{summary}</summary>{table}</details>")
    return "".join(parts)


def _answered_row(row: dict) -> str:
    boxes = [(row["wanted"], "given"), (row["answer"], "answered")] if row["overlap"] is not None else []
    files = [*row["images"], *row["videos"]]
    shown = "".join(f'<div class="shown">{picture(Path(file))}{outlines(Path(file), boxes)}</div>' for file in files)
    said = "<br>".join(html.escape(text.replace("<image>", "▣ ").replace("<video>", "▶ ")) for text in row["said"])
    right = marks({"" if row["overlap"] is None else f"overlap {row['overlap']:.2f}": row["right"]})
    cells = [shown, said, f"{html.escape(row['answer'])} {right}", html.escape(row["wanted"])]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def outlines(path: Path, boxes: Sequence[tuple[str, str]]) -> str:
    """Boxes (text, class of the style) over a picture; a text that is no box draws nothing."""
    drawn = [(read_box(text), name) for text, name in boxes]
    if not any(box for box, _ in drawn):
        return ""
    width, height = Image.open(path).size
    rectangles = "".join(
        f'<rect class="{name}" x="{box[0]}" y="{box[1]}" width="{max(0, box[2] - box[0])}" '
        f'height="{max(0, box[3] - box[1])}"/>'
        for box, name in drawn
        if box
    )
    return f'<svg viewBox="0 0 {width} {height}">{rectangles}</svg>'


def verdict(row: dict) -> str:
    return f"{html.escape(row['shows'])}<br>{marks(row['right'])}<br>kept: {row['kept']:.1f} dB"


def percentages(scores: dict) -> str:
    rows = "".join(f"<tr><td>{name}</td><td>{100 * share:.0f} %</td></tr>" for name, share in scores["totals"].items())
    return f"<table>{rows}</table>"


def curves(metrics: Path) -> str:
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    loss = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    validation = [(r["step"], r["validation_loss"]) for r in rows if "validation_loss" in r]
    exact = [(r["step"], r["validation_exact"]) for r in rows if "validation_exact" in r]
    fixed = "" if exact else ": clips not trained on, always the same timesteps and noise"
    return (
        chart("training loss, each step and smoothed", smooth(loss), faint=loss)
        + chart(f"validation loss{fixed}", validation)
        + chart("share of the validation questions that are answered right, to the letter", exact)
    )


def _each(scores: dict[str, dict], show: Callable[[dict], str]) -> str:
    named = len(scores) > 1
    return "".join((f"<h3>{name}</h3>" if named else "") + show(measured) for name, measured in scores.items())


def write_report(
    path: Path,
    *,
    title: str,
    told: str,
    metrics: Sequence[Path],
    scores: dict[str, dict],
    progress: Sequence[tuple[str, Path]],
    stages: Sequence[tuple[str, float, str]],
    pages: Sequence[str] = (),
) -> None:
    """`told` stands above the clips; `metrics` of one training or of several; `scores` by measure.py, with a name
    for each where there are several; `progress` is one prompt at growing steps; `stages` are (name, seconds, command);
    `pages` are commands that open what was made in the browser.
    """
    table = "".join(f"<tr><td>{html.escape(n)}</td><td>{s:.1f} s</td></tr>" for n, s, _ in stages)
    commands = "\n\n".join(f"# {name}\n{command}" for name, _, command in stages)
    learned = "".join(curves(file) for file in metrics)
    grown = "".join(figure(file, name) for name, file in progress)
    if grown:
        learned += f'<h3>one prompt, as training went on</h3><div class="clips">{grown}</div>'
    answers = any("answers" in measured for measured in scores.values())
    shown, done = (answered, "answered") if answers else (generated, "drawn")
    sections = {
        f"What was asked, what was {done}": f"<p>{html.escape(told)}</p>{_each(scores, shown)}",
        "How often it is right": _each(scores, percentages),
        "How it learned": learned,
        "Time": f"<table>{table}</table>",
        "Make more, in the browser": f"<pre>{html.escape(chr(10).join(pages))}</pre>",
        "The commands": f"<pre>{html.escape(commands)}</pre>",
    }
    body = "".join(f"<h2>{heading}</h2>{content}" for heading, content in sections.items())
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    path.write_text(f'<!doctype html><html lang="en">{head}<h1>{title}</h1>{body}</html>\n', encoding="utf-8")

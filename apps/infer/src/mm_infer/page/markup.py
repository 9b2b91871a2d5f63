"""The HTML of the page: a video, cards of many, a table of what differs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from mm_infer.page.studio import Made, difference

MOST = 60
"""Videos that are shown at once."""
CSS = """
.mm-grid {display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 12px}
.mm-card {border: 2px solid var(--border-color-primary); border-radius: 8px; padding: 6px; cursor: pointer;
  background: var(--background-fill-primary); text-align: left; font-size: 13px; font-weight: normal;
  color: var(--body-text-color)}
.mm-card:hover, .mm-card:focus {border-color: var(--primary-500)}
.mm-card video {width: 100%; aspect-ratio: 16/10; object-fit: contain; background: #111; border-radius: 4px}
.mm-card span {display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.mm-small {color: var(--body-text-color-subdued)}
.mm-video video {width: 100%; max-height: 60vh; min-height: 160px; object-fit: contain; background: #111;
  border-radius: 8px}
.mm-table {border-collapse: collapse; font-size: 14px; width: 100%}
.mm-table td, .mm-table th {border: 0; border-bottom: 1px solid var(--border-color-primary); padding: 4px 8px;
  text-align: left; vertical-align: top; overflow-wrap: anywhere}
.mm-status {padding: 8px 0; min-height: 3em}
.mm-error {color: var(--error-text-color, #b91c1c)}
.mm-command textarea {font-family: var(--font-mono); font-size: 13px}
"""
CARDS = """
element.addEventListener('click', event => {
  const card = event.target.closest('[data-name]');
  if (card) trigger('click', {name: card.dataset.name});
});
"""


def status(text: str, error: bool = False) -> str:
    role, kind = ("alert", " mm-error") if error else ("status", "")
    return f'<div class="mm-status{kind}" role="{role}">{escape(text)}</div>'


def _address(made: Made) -> str:
    return f"/made/{quote(made.name)}?{made.file.stat().st_mtime_ns}"  # another one in its place is another address


def film(made: Made) -> str:
    return f'<video src="{_address(made)}" controls loop autoplay muted playsinline></video>'


def short(prompt: Any, length: int = 60) -> str:
    text = " ".join(str(prompt).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def cards(made: Sequence[Made]) -> str:
    if not made:
        return "<p>Nothing is made yet.</p>"
    cards = []
    for one in made[:MOST]:
        record = one.record
        facts = (
            f"{record.get('width')}x{record.get('height')}, {record.get('frames')} frames, seed {record.get('seed')}"
        )
        title = escape(f"{one.name}: {record.get('prompt')}")
        cards.append(
            f'<button class="mm-card" data-name="{escape(one.name)}" title="{title}">'
            f'<video src="{_address(one)}" muted loop playsinline preload="metadata" onmouseover="this.play()" '
            f'onmouseout="this.pause()"></video><span>{escape(short(record.get("prompt")))}</span>'
            f'<span class="mm-small">{escape(facts)}</span></button>'
        )
    more = f"<p>{len(made) - MOST} older ones are in the folder.</p>" if len(made) > MOST else ""
    return f'<div class="mm-grid">{"".join(cards)}</div>{more}'


def differences(one: Made, other: Made) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_plain(a))}</td><td>{escape(_plain(b))}</td></tr>"
        for name, a, b in difference(one.record, other.record)
    )
    if not rows:
        return "<p>All settings are the same.</p>"
    head = f"<tr><th>differs</th><th>A: {escape(one.name)}</th><th>B: {escape(other.name)}</th></tr>"
    return f'<table class="mm-table">{head}{rows}</table>'


def _plain(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

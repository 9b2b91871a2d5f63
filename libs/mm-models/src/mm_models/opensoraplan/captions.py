"""Prompts in the form of the captions that Open-Sora-Plan 1.2 was trained on.

The makers cleaned every caption as DeepFloyd IF does, twice. What is left is lower case, without markup, addresses,
file names, numbers of articles and most punctuation. Chinese stays, unlike in the cleaner of diffusers.
"""

import html
import re
from html.entities import html5
from html.parser import HTMLParser
from urllib.parse import unquote_plus

_FILE = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_HOST = r"[a-zA-Z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = (
    r"\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63"
)

_ADDRESSES = [(rf"\b(?:(?:https?|www):(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", "")]
_SYMBOLS = [
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u4dff]+", ""),  # strokes, phonetic extensions, enclosed and rare characters, hexagrams
    (rf"[-{_DASHES}\uff0d]+", "-"),
    (r"[`\xb4«»“”¨]", '"'),
    (r"[\u2018\u2019]", "'"),
    ("&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # addresses of computers
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # as two characters
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{_FILE}", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_WORDS = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # numbers of articles: jc6640, jc6640vc, 6640vc231
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILE}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\xd7]\d+\.?\d*\b", ""),  # sizes, with a Latin or Cyrillic x, or a cross
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
]
_ENDS = [
    (r"^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]


def clean(prompt: str) -> str:
    """A prompt as the makers of Open-Sora-Plan 1.2 cleaned it, in training."""
    return _clean_once(_clean_once(prompt))


def _clean_once(text: str) -> str:
    import ftfy

    text = unquote_plus(text).strip().lower().replace("<person>", "person")
    text = _apply(_SYMBOLS, _without_markup(_apply(_ADDRESSES, text)))
    if len(re.findall("[-_]", text)) > 3:  # this-is-my-cute-cat
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(_ENDS, _apply(_WORDS, text)).strip()


def _apply(rules: list[tuple[str, str]], text: str) -> str:
    for pattern, put in rules:
        text = re.sub(pattern, put, text)
    return text


def _without_markup(text: str) -> str:
    """The text between the tags of HTML, as the makers' BeautifulSoup gives it; all of it where it is none (`<![`)."""
    reader = _Text()
    try:
        reader.feed(text)
        reader.close()
    except AssertionError:  # so the parser of Python says that it does not understand
        return text
    return "".join(reader.parts)


class _Text(HTMLParser):
    """Scripts and style sheets are no text. Of an entity that is not known, only the semicolon is lost."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        if self.cdata_elem not in ("script", "style"):
            self.parts.append(data)

    def handle_entityref(self, name: str) -> None:
        self.parts.append(html5.get(f"{name};", f"&{name}"))

    def handle_charref(self, name: str) -> None:
        self.parts.append(html.unescape(f"&#{name};"))

    def unknown_decl(self, data: str) -> None:
        if data.upper().startswith("CDATA["):
            self.parts.append(data[len("CDATA[") :])

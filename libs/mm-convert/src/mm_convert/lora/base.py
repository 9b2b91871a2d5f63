"""What an adapter was trained on: facts in the header of its file, compared with the weights that it is put on.

The facts are texts by name. One, `content`, tells weights apart: it is that of the same numbers in any layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from mm_convert.tensors.views import LazyTensor

KEY = "trained_on"
"""In the metadata of the header, which other loaders pass over."""
CONTENT = "content"
REFUSED = {
    "family": "its layers mean something else there",
    "prediction": "what it adds to the one is wrong in the other",
    "expert": "the two see other noise levels, and learn other things",
}
"""Facts in which the two must agree, and why. Others may differ: adapters are used on relatives of their base too."""
_MODULES = 16


def describe_content(tensors: Mapping[str, LazyTensor], modules: Collection[str]) -> dict[str, str]:
    """What tells these weights apart, as a fact: the first rows of up to 16 linears, in bfloat16.

    So float32 and bfloat16 of the same model are the same, and the bytes that are read are few. Needs torch.
    tensors: weights by our names. modules: by our names, the linears that an adapter stands beside; {} unless the
    weights have all of them.
    """
    from mm_convert.tensors.torch import DTYPES, rows_of, torch

    names = sorted(modules)
    chosen = dict.fromkeys(f"{names[i * len(names) // _MODULES]}.weight" for i in range(_MODULES)) if names else {}
    if not chosen or any(name not in tensors or tensors[name].dtype not in DTYPES for name in chosen):
        return {}
    digest = hashlib.sha256()
    for name in chosen:
        row = rows_of(tensors[name], 0, 1).to(torch.bfloat16).contiguous().view(torch.int16)
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode() + row.numpy().tobytes())
    return {CONTENT: digest.hexdigest()[:16]}


def check_base(said: Mapping[str, str], now: Mapping[str, str], what: str) -> list[str]:
    """Compare what an adapter was trained on with the weights at hand; facts that either does not know are passed over.

    said, now: the facts of both. what: the adapter, for messages.
    Returns what a person should know of what may differ. ValueError for what may not.
    """
    other = {name: (said[name], now[name]) for name in said if name in now and said[name] != now[name]}
    for name, why in REFUSED.items():
        if name in other:
            then, here = other[name]
            raise ValueError(
                f"{what} was trained on weights of {name} {then}{_named(said)}, and these are of {name} {here}: {why}. "
                f"Give weights of {name} {then}, or an adapter for {here}"
            )
    if CONTENT in other:
        return [f"it was trained on other weights{_named(said)}: what it does on these is not known"]
    return []


def _named(said: Mapping[str, str]) -> str:
    return f" ({said['model']})" if "model" in said else ""


def read_base(metadata: Mapping[str, str], where: str) -> dict[str, str]:
    """The facts of a header; {} where it says none. ValueError for what are no texts by name."""
    if KEY not in metadata:
        return {}
    try:
        said: Any = json.loads(metadata[KEY])
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise ValueError(
            f"the header of {where} says {KEY} {metadata[KEY]!r:.60}; it must be a JSON object of texts, as mm_train "
            "writes it"
        )
    return said

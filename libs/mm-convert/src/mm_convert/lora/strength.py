"""The alpha of every module of an adapter, from all places that may say it; they must agree with the tensors."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import isclose, isfinite, sqrt
from typing import Any

from mm_convert.files import parse_json
from mm_convert.lora.names import MERGE_THERE, Names
from mm_convert.tensors.views import LazyTensor

Said = dict[str, tuple[float | None, float | None]]  # module as found -> rank and alpha, where they are said

# Settings of peft under which factors mean something else, and the values under which they do not.
_SPECIAL = {
    **dict.fromkeys(("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "layer_replication"), (None, False)),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "target_parameters"), (None, [])),
    **dict.fromkeys(("alora_invocation_tokens", "use_bdlora", "arrow_config"), (None, False)),
    **dict.fromkeys(("kasa_config", "velora_config", "monteclora_config"), (None,)),
    "bias": (None, "none"),
    "peft_type": (None, "LORA"),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva", "mica"),  # others change the base
}
_PATTERNS = ("rank_pattern", "alpha_pattern")
# Matching goes back and forth at every repetition and group: with many of them it takes hours.
_MAX_PATTERNS, _MAX_PATTERN = 10_000, 300  # how many, and characters of one
_MAX_CHOICES = 3, 30  # repetitions and groups, of one pattern and of all
_MAX_ALTERNATIVES = 16
_LITERAL = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)  # what has no choice: an escaped character, a class
_KNOWN = {"r", "lora_alpha", "use_rslora", *_PATTERNS, *_SPECIAL}
# A header's own words for rank and alpha, without what stands between words: lora_alpha, ss_network_dim, LoRA Alpha, …
_RANK = re.compile(r"(ss)?((lora|network|adapter)?(r|rank)|(lora|network|adapter)dim)")
_ALPHA = re.compile(r"(ss)?(lora|network|adapter|linear)?alpha")
_MAYBE = re.compile(r"alpha|lora.*scal|^scal(e|ing)$", re.IGNORECASE)  # what may be said in yet other words
_TABLES = re.compile(r"lora|adapter|peft|network|transformer", re.IGNORECASE)  # JSON objects of a header
_MODELS = ("transformer.", "transformer_2.")  # of diffusers, which says of each model alone what it is
_PICTURES = ("workflow", "prompt")  # of ComfyUI: whole graphs, in which other things have an alpha
_OPEN = ("", "none", "null", "dynamic")  # what trainers write where there is no one value
_UNPACK = {"F16": "<e", "F32": "<f", "F64": "<d", "I32": "<i", "I64": "<q"}
_ALPHA_IS_RANK = ("diffusers", "comfyui", "kohya", "diffsynth")  # what their loaders take it for where nothing is said


def find_alphas(
    names: Names,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    adapter_config: Mapping[str, Any] | None,
    where: str,
    rank: float | None,
    alpha: float | None,
    guess: bool,
) -> tuple[dict[str, float], list[str]]:
    """Module as found -> alpha, and notes; the arguments are those of `read_lora`.

    Raises ValueError when alpha is unknown, and when two places contradict each other.
    """
    ranks = {module: tensors[parts["A"]].shape[0] for module, parts in names.parts.items()}
    places: dict[str, Said] = {}
    own = {module: parts["alpha"] for module, parts in names.parts.items() if "alpha" in parts}
    places[f"the alpha tensors of {where}"] = {
        module: (None, _value(tensors[own[module]], own[module])) for module in own
    }
    if adapter_config is not None:
        place = f"the adapter_config.json of {where}"
        places[place] = _of_config(adapter_config, ranks, place)
    for place, settings in _tables(metadata, f"the header of {where}"):
        places[place] = _of_config(_of_prefix(settings, names.prefix, place), ranks, place)
    record = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    # How a training was told to be; of a module with an alpha of its own, loaders ask no further.
    place = f"the header of {where} (ss_…)"
    places[place] = _of_config(_of_prefix(record, "", place), {m: r for m, r in ranks.items() if m not in own}, place)
    places["the caller"] = dict.fromkeys(ranks, _numbers(rank, alpha, "the caller"))

    alphas = _agree(places, ranks, where)
    unsaid = {module: float(ranks[module]) for module in ranks if module not in alphas}
    if not unsaid:
        return alphas, []
    odd = [f"{key} {value[:60]}" for key, value in metadata.items() if _may_say_alpha(key, value)]
    guess = guess and not names.wrapped
    if names.twofold or names.format not in _ALPHA_IS_RANK or not guess or odd:
        why = _why(names, guess, odd, adapter_config)
        raise ValueError(
            f"{where} does not say its alpha ({why}), and without it the strength would be a guess: "
            "give the training's own (--lora_alpha); the rank is "
            + ", ".join(f"{r:g}" for r in sorted({*unsaid.values()}))
        )
    note = f"alpha of {len(unsaid)} modules is said nowhere and taken to be the rank, as {names.format} loaders do"
    return alphas | unsaid, [note]


def _agree(places: Mapping[str, Said], ranks: Mapping[str, int], where: str) -> dict[str, float]:
    """Module as found -> the alpha that all places say which say any; first come, first believed."""
    believed: dict[str, tuple[float, str]] = {}
    for place, said in places.items():
        for module, (rank, alpha) in said.items():
            if rank is not None and rank != ranks[module]:
                raise ValueError(
                    f"{place} says rank {rank:g}, but the factors of {module} in {where} have {ranks[module]}"
                )
            if alpha is None:
                continue
            first, origin = believed.setdefault(module, (alpha, place))
            if not isclose(alpha, first, rel_tol=2**-7):  # an alpha tensor may be a rounded bfloat16
                raise ValueError(
                    f"{place} says alpha {alpha:g} for {module}, but {origin} says {first:g}: "
                    "they do not belong together, or one was edited"
                )
    return {module: alpha for module, (alpha, _) in believed.items()}


def _why(names: Names, guess: bool, odd: list[str], adapter_config: Mapping[str, Any] | None) -> str:
    if odd:
        return f"its header says {', '.join(odd)}, of which nobody knows whether it is alpha"
    if not guess:
        return "it is a training checkpoint, which holds tensors alone; one of our own runs can be exported"
    if names.twofold:
        return "its names are MindSpeed-MM's as well as others', who mean the rank"
    if names.format == "peft":
        if adapter_config is not None:
            return "its adapter_config.json says none for some modules"
        return "no adapter_config.json is read: it counts beside a file of the name adapter_model alone"
    return f"{names.format} files hold neither rank nor alpha"


def _tables(metadata: Mapping[str, str], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a header says: its own fields, and those of the JSON objects in it, as `transformer.r`."""
    yield place, {key: value for key, value in metadata.items() if not key.startswith("ss_")}
    for key, value in metadata.items():
        if not _is_table(key, value):
            continue
        try:
            table = dict(_flatten({**parse_json(value)}))
        except (ValueError, TypeError) as error:
            if key != "lora_adapter_metadata":
                continue  # not JSON; if it may say alpha, and nothing else does, that is said
            raise ValueError(f"{place}, {key}, is not a JSON object: {error}") from error
        if not _TABLES.search(key):  # other things have a rank too
            table = {name: said for name, said in table.items() if _word(_last(name)) == "lora_alpha"}
        yield f"{place}, {key},", table


def _is_table(key: str, value: str) -> bool:
    json_ = value.lstrip().startswith("{") and not key.startswith("ss_") and key not in _PICTURES
    return key == "lora_adapter_metadata" or json_


def _flatten(table: Mapping[str, Any], depth: int = 3) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and depth and not _word(_last(key)):
            yield from ((f"{key}.{inner}", said) for inner, said in _flatten(value, depth - 1))
        else:
            yield key, value


def _may_say_alpha(key: str, value: str) -> bool:
    """Whether a field of a header that was not understood may be about it."""
    if _is_table(key, value):
        return bool(_TABLES.search(key)) and bool(re.search(r"alpha\W*\d", value))
    number = _literal(value)
    return bool(_MAYBE.search(key)) and isinstance(number, int | float) and not ("scal" in key and number == 1)


def _last(key: str) -> str:
    return re.split(r"[./:]", key)[-1]


def _of_prefix(settings: Mapping[str, Any], prefix: str, place: str) -> dict[str, Any]:
    """What is said of the model whose names have this prefix, in peft's words; where nothing is, what is said of any.

    Raises ValueError for a rank or an alpha that is said twice, and not alike.
    """
    words = [(key.removeprefix(prefix), key) for key in settings if prefix and key.startswith(prefix)]
    if not any(_word(short) for short, _ in words):
        others = [other for other in _MODELS if other != prefix] if prefix in _MODELS else []
        words = [(_last(key), key) for key in settings if not key.startswith(("text_encoder", *others))]
    found: dict[str, str] = {}
    for short, key in words:
        word = _word(short)
        if not word or _is_open(settings[key]):
            continue
        first = found.setdefault(word, key)
        if _literal(settings[first]) != _literal(settings[key]):
            raise ValueError(
                f"{place} says two things: {first} {settings[first]!r:.60} and {key} {settings[key]!r:.60}"
            )
    return {word: _literal(settings[key]) for word, key in found.items()}


def _literal(value: Any) -> Any:
    """What a header has as text, as JSON or as Python writes it."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except ValueError:
        return {"True": True, "False": False}.get(value, value)


def _word(key: str) -> str:
    """The same in peft's words; "" for what says nothing of the strength."""
    if key in _KNOWN:
        return key
    squeezed = re.sub(r"[\s_-]", "", key).lower()
    return "r" if _RANK.fullmatch(squeezed) else "lora_alpha" if _ALPHA.fullmatch(squeezed) else ""


def _is_open(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in _OPEN)


# What a setting of peft makes of an adapter, and what to do, where merging is not all that can be done.
_INITS = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ"}
_KINDS = {
    "use_dora": "DoRA, with magnitudes beside the factors",
    "use_qalora": "QALoRA, of grouped inputs",
    "bias": "biases were trained too",
    "lora_bias": "the factors have biases",
    "modules_to_save": "whole modules were trained too",
    "target_parameters": "parameters of experts were adapted",
}


def _of_config(config: Mapping[str, Any], ranks: Mapping[str, int], place: str) -> Said:
    """Rank and alpha by peft's rules: a pattern is a regular expression for the end of a name, and the first wins."""
    special = [key for key, plain in _SPECIAL.items() if config.get(key) not in plain]
    if special:
        said, kinds = zip(*((f"{key} {config[key]!r:.60}", _kind(key, config[key])) for key in special), strict=True)
        raise ValueError(
            f"{place} uses {', '.join(said)}: this is not plain LoRA, which alone can be converted "
            f"({'; '.join(kinds)}). To use it, {MERGE_THERE}"
        )
    if config.get("use_rslora") not in (None, True, False) or type(config.get("use_rslora")) is int:
        raise ValueError(f"{place} says use_rslora {config['use_rslora']!r:.60}; it must be true or false")
    rank_of, alpha_of = (_read_patterns(key, config, place) for key in _PATTERNS)
    result = {}
    for module in ranks:
        rank, alpha = _numbers(
            _matching(rank_of, module, config.get("r")), _matching(alpha_of, module, config.get("lora_alpha")), place
        )
        if config.get("use_rslora") and alpha is not None:
            alpha *= sqrt(ranks[module])  # alpha/sqrt(rank) is this alpha/rank
        result[module] = rank, alpha
    return result


def _kind(key: str, value: Any) -> str:
    """What this setting makes of an adapter."""
    if key == "init_lora_weights":
        name = next((name for start, name in _INITS.items() if str(value).startswith(start)), str(value))
        can = name in ("PiSSA", "OLoRA", "CorDA")
        way = "; peft saves it as plain LoRA with path_initial_model_for_weight_conversion" if can else ""
        return f"{name}: its factors belong on a base that was changed before training{way}"
    if key == "peft_type":
        return f"{value} of peft"
    return _KINDS.get(key, f"{key} of peft")


def _read_patterns(key: str, config: Mapping[str, Any], place: str) -> list[tuple[re.Pattern[str], Any]]:
    """The patterns of a setting, and what they stand for. Raises ValueError for those that would take long to match."""
    try:
        said = dict(config.get(key) or {})
        choices = 0
        for pattern in said:
            plain = _LITERAL.sub("x", pattern)
            own = len(re.findall(r"(?<!\()[*+?{]|\(", plain))
            choices += own
            many = own > _MAX_CHOICES[0] or plain.count("|") > _MAX_ALTERNATIVES or len(pattern) > _MAX_PATTERN
            if many or re.search(r"\)[*+{]", plain):
                raise ValueError(
                    f"{pattern[:80]!r} has more repetitions, groups or characters than the name of a module"
                )
        if choices > _MAX_CHOICES[1] or len(said) > _MAX_PATTERNS:
            raise ValueError(f"there are {len(said):,}, with {choices:,} repetitions and groups")
        return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in said.items()]
    except (re.error, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{place} has a {key} that is not read: {error}; name the modules in full, as blocks.0.attn1.to_q"
        ) from error


def _matching(patterns: Sequence[tuple[re.Pattern[str], Any]], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _numbers(rank: Any, alpha: Any, place: str) -> tuple[float | None, float | None]:
    return (
        None if rank is None else _number("rank", rank, place),
        None if alpha is None else _number("alpha", alpha, place),
    )


def _number(what: str, said: Any, place: str) -> float:
    try:
        number = 0.0 if isinstance(said, bool) else float(said)
    except (TypeError, ValueError, OverflowError):
        number = 0.0
    if not isfinite(number) or not number:
        raise ValueError(f"{place} says {what} {said!r:.60}; it must be a number other than 0")
    return number


def _value(tensor: LazyTensor, what: str) -> float:
    data = bytes(tensor.read()) if tensor.nbytes <= 8 else b""
    if tensor.dtype == "BF16" and len(data) == 2:
        data = bytes(2) + data  # the upper half of a float32
    form = _UNPACK.get("F32" if tensor.dtype == "BF16" else tensor.dtype)
    if form is None or len(data) != struct.calcsize(form):
        raise ValueError(f"alpha of {what} is {tensor.dtype} {list(tensor.shape)}; it must be one number")
    return _number("alpha", struct.unpack(form, data)[0], what)

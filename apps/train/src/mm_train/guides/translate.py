"""From MindSpeed-MM's options to our two configurations."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any

from mm_convert.cli.values import check_value
from mm_parallel.config import Layers, ParallelConfig, check_in_stem
from mm_train.guides.names import plain, row_of, spellings

_VP = "virtual_pipeline_model_parallel_size"
_Count = Annotated[int, ">= 0"]
_Tower = tuple[_Count, ...] | tuple[tuple[_Count, ...], ...]
_ALGOS = ("ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo")


def translate(settings: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(arguments of ParallelConfig, arguments of MemoryConfig, what has no effect here and why).

    settings: MindSpeed-MM's options, from whichever of their files, with dashes or underscores, with or without leading
        `--`, numbers and lists also as text. An option of a shell script without a value is given as True.

    Raises ValueError for a name that is not in the table, for what MindSpeed-MM refuses, for options that contradict
    each other, and for the few things that cannot be had here.
    """
    given, notes = _rows(settings)
    if of_data := [name for name in given if row_of(name).section == "data"]:
        raise ValueError(f"{of_data[0]} is neither of the layout nor of memory: it is data.{row_of(of_data[0]).guides}")
    parallel = _context(given) | _pipeline(given, notes) | _sharding(given)
    if (tp := given.get("tensor_model_parallel_size")) is not None:
        parallel["tp"] = number("tensor_model_parallel_size", tp)
    return parallel, _recompute(given, notes) | _fsdp(given, notes), notes


def translate_data(settings: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    """(fields of DataConfig, what has no effect here and why), of MindSpeed-MM's names for data, as `translate`."""
    given, notes = _rows(settings)
    if others := [name for name in given if row_of(name).section != "data"]:
        raise ValueError(f"{others[0]} is no name of data: it is {row_of(others[0]).section}.{others[0]}")
    found: dict[str, Any] = {
        row_of(name).ours[0]: given[name] for name in ("data_path", "from_pretrained") if name in given
    }
    if "seq_length" in given:
        found["max_tokens"] = number("seq_length", given["seq_length"])
    if "enable_encoder_dp" in given:
        found["share_encoding"] = _switch("enable_encoder_dp", given["enable_encoder_dp"])
    steps = [name for name in ("interleaved_steps", "encoder_offload_interval") if name in given]
    if len(steps) == 2:
        raise ValueError("interleaved_steps and encoder_offload_interval are two names of one thing: give one of them")
    count = number(steps[0], given[steps[0]]) if steps else 1
    interleaved = _switch("interleaved", given.get("interleaved", False))
    if steps == ["interleaved_steps"] and not interleaved:
        raise ValueError(
            f"interleaved_steps {count} does nothing without interleaved: give interleaved true, or leave both out"
        )
    if steps or "interleaved" in given:
        found["encode_every"] = count if interleaved or count > 1 else 0
    return found, notes


def _rows(settings: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    """(values by the names of the table, notes on those that have no effect). ValueError for what is not in it."""
    given: dict[str, Any] = {}
    notes: list[str] = []
    for name, value in settings.items():
        row = row_of(name)
        if row is None:
            near = get_close_matches(plain(name), spellings(), n=1)
            raise ValueError(f"{name} is none of MindSpeed-MM's names" + (f": is it {near[0]}?" if near else ""))
        if row.guides in given:
            raise ValueError(f"{name} is given twice, under two spellings")
        given[row.guides] = value_of(value)
        if not row.ours and given[row.guides] is not False:
            notes.append(f"{row.guides}: {row.says}")
    return given, notes


def _context(given: Mapping[str, Any]) -> dict[str, int]:
    cp = number("context_parallel_size", given.get("context_parallel_size", 1))
    degree = given.get("ulysses_degree_in_cp")
    if degree is not None and not given.keys() & {"context_parallel_size", "context_parallel_algo"}:
        return {"ulysses": number("ulysses_degree_in_cp", degree)}
    algo = given.get("context_parallel_algo", "hybrid_cp_algo" if degree is not None else "ulysses_cp_algo")
    if algo not in _ALGOS:
        raise ValueError(f"context_parallel_algo {algo} is not implemented: use {', '.join(_ALGOS)}")
    if algo == "hybrid_cp_algo":
        if degree is None:
            raise ValueError("hybrid_cp_algo needs ulysses_degree_in_cp: how many of the cp ranks exchange heads")
        degree = number("ulysses_degree_in_cp", degree)
        if cp % degree:
            raise ValueError(f"context_parallel_size {cp} is not a multiple of ulysses_degree_in_cp {degree}")
        return {"ulysses": degree, "ring": cp // degree}
    if degree is not None:
        raise ValueError(f"ulysses_degree_in_cp is for hybrid_cp_algo, not for {algo}")
    if algo == "megatron_cp_algo":
        return {"ring": cp}
    return {"cp": cp} if "context_parallel_size" in given else {}


def _pipeline(given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    if "num_layers_per_virtual_pipeline_stage" in given:
        raise ValueError("num_layers_per_virtual_pipeline_stage is deprecated: give nested pipeline_num_layers")
    names = [name for name in ("pipeline_num_layers", "llm_pp_layers") if name in given]
    if len(names) == 2:
        raise ValueError("pipeline_num_layers and llm_pp_layers are two names of one thing: give one of them")
    (name,) = names or ["pipeline_num_layers"]
    layers = given.get(name)
    pp = given.get("pipeline_model_parallel_size")
    vp = max(1, number(_VP, given.get(_VP) or 1, least=-1))  # 1 or less: off
    if pp is not None:
        pp = number("pipeline_model_parallel_size", pp)
    if not layers:
        if (pp or 1) > 1 or vp > 1:
            raise ValueError(f"{name} must be given for a pipeline (PP {pp or 1}, VP {vp})")
        if "vit_pp_layers" in given:
            raise ValueError("vit_pp_layers without llm_pp_layers: give both, for as many stages")
        return {}
    layers = check_value(name, layers, Layers)
    one = len(layers) == 1 and (not isinstance(layers[0], tuple) or len(layers[0]) == 1)  # [36] and [[36]]
    rows = ((1,),) if one else ParallelConfig(pp_layers=layers).stages
    _check_tower(given, name, rows)
    if _VP in given and vp != len(rows):
        raise ValueError(
            f"virtual_pipeline_model_parallel_size {vp} must equal the length of {name}, which has "
            f"{len(rows)} virtual stages of {len(rows[0])} ranks: {list(map(list, rows))}"
        )
    if pp == 1 and len(rows[0]) > 1:
        notes.append(f"{name}: PP is 1, so there is no pipeline; with it there would be {len(rows[0])} stages")
        return {}
    if pp is not None and pp != len(rows[0]):
        raise ValueError(f"PP {pp} must equal the number of ranks in {name} {layers}: {len(rows[0])}")
    return {} if one else {"pp_layers": layers}


def _check_tower(given: Mapping[str, Any], name: str, rows: Layers) -> None:
    """The layers of a vision tower: as many stages as the language model's, all layers on the first."""
    if "vit_pp_layers" not in given:
        return
    tower = check_value("vit_pp_layers", given["vit_pp_layers"], _Tower)
    nested = [list(row) if isinstance(row, (list, tuple)) else [row] for row in tower]
    flat = [count for row in nested for count in row]
    stages = [count for row in rows for count in row]
    if len(flat) != len(stages):
        raise ValueError(f"vit_pp_layers has {len(flat)} stages, {name} has {len(stages)}: give both for as many")
    check_in_stem(tower, "vit_pp_layers")


def _sharding(given: Mapping[str, Any]) -> dict[str, int]:
    names = [name for name in ("zero3_size", "sharding_size") if name in given]
    if len(names) == 2:
        raise ValueError("zero3_size is of LayerZeRO and sharding_size of FSDP2: give one of them")
    if not names:
        return (
            {"dp_shard": _share(given, "zero3_size", 8)} if _switch("layerzero", given.get("layerzero", False)) else {}
        )
    size = given[names[0]]
    if names[0] == "sharding_size" and size in ("auto", None):
        return {"dp_shard": 1 if size is None else -1}
    return {"dp_shard": _share(given, names[0], number(names[0], size))}


def _share(given: Mapping[str, Any], name: str, size: int) -> int:
    cp = number("context_parallel_size", given.get("context_parallel_size", 1))
    if size % cp:
        raise ValueError(f"{name} {size} must be a multiple of context_parallel_size {cp}: its ranks share the shards")
    return size // cp


def _recompute(given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    if _switch("distribute_saved_activations", given.get("distribute_saved_activations", False)):
        raise ValueError("distribute_saved_activations is not implemented, neither here nor there")
    granularity = given.get("recompute_granularity")
    if granularity not in ("full", None):
        raise ValueError(f"recompute_granularity {granularity} is not supported for video models: use full")
    method = given.get("recompute_method")
    if method not in ("block", "uniform", None):
        raise ValueError(f"recompute_method {method}: there are block and uniform")
    found: dict[str, Any] = {}
    if granularity or method == "uniform":
        found["recompute"] = "full"
    count = given.get("recompute_num_layers")
    if count is not None and method != "uniform":
        found["recompute"] = number("recompute_num_layers", count, least=0)
    if modules := given.get("recompute_modules"):
        check_value("recompute_modules", modules, list[str])
        some = [name for name in modules if not name.endswith(".{*}")]
        if some or found:
            raise ValueError(f"recompute_modules {modules} cannot be had here: only all blocks, as blocks.{{*}}, alone")
        found["recompute"] = "full"
    skip = given.get("recompute_num_layers_skip_core_attention")
    skips = given.get("recompute_skip_core_attention")
    skips = skips is None or _switch("recompute_skip_core_attention", skips)
    if given.get("recompute_skip_core_attention") and skip is None:
        raise ValueError("recompute_skip_core_attention needs recompute_num_layers_skip_core_attention: of how many")
    if skip is not None and skips:
        found["but_attention"] = number("recompute_num_layers_skip_core_attention", skip, least=0)
        if not isinstance(found.setdefault("recompute", 0), int):
            raise ValueError("recompute_num_layers_skip_core_attention needs recompute_num_layers and method block")
    if "attention_async_offload" in given:
        wanted = _switch("attention_async_offload", given["attention_async_offload"])
        if wanted and not found.get("but_attention"):
            notes.append("attention_async_offload: no layer skips core attention in its recompute, so it does nothing")
            wanted = False
        found["offload"] = "attention" if wanted else "none"
    return found


def _fsdp(given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in (("reshard_after_forward", "reshard"), ("offload_to_cpu", "offload_params")):
        if name in given:
            found[field] = _switch(name, given[name])
    if "reduce_dtype" in given:
        words = {"fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}
        if (asked := str(given["reduce_dtype"])) not in words:
            raise ValueError(f"reduce_dtype is {asked!r}: gradients are reduced in fp32 or bf16")
        found["reduce"] = words[asked]
    ahead = [f"num_to_{way}_prefetch" for way in ("forward", "backward") if f"num_to_{way}_prefetch" in given]
    if ahead:
        numbers = [number(name, given[name], least=0) for name in ahead]
        found["prefetch"] = max(numbers)
        if len(ahead) == 1 or numbers[0] != numbers[1]:
            notes.append(f"{ahead[0]}: prefetch {max(numbers)} is for both directions")
    return found


def value_of(value: object) -> Any:
    """What a text means: numbers, lists and truth values as JSON or Python write them, else the text."""
    if not isinstance(value, str):
        return value
    words = {"True": True, "False": False, "None": None}
    try:
        return words[value] if value in words else json.loads(value)
    except (ValueError, RecursionError):  # also a number of 5,000 digits, and lists a thousand deep
        return value


def number(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {least}")
    return value


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, but here it can only be true or false")
    return value

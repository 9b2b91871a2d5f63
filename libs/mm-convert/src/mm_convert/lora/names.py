"""How files of low-rank adapters (LoRA) call their tensors.

A name is a prefix, the module in one of the dialects of a family, and a part: `lora_A` (r x in), `lora_B` (out x r), or
the `alpha` of that module.

    peft, ours  base_model.model.blocks.0.self_attn.q.lora_A.weight     with rank and alpha in adapter_config.json
    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight           with both in the header, as JSON, or nowhere
    comfyui     diffusion_model.blocks.0.self_attn.q.lora_down.weight   with alpha as a tensor, or nowhere
    kohya       lora_unet_blocks_0_self_attn_q.lora_down.weight         so do musubi-tuner and others
                lora_unet__blocks_0_self_attn_q.lora_down.weight        VideoX-Fun; lycoris_blocks_…, of LyCORIS
    diffsynth   blocks.0.self_attn.q.lora_A.default.weight              with alpha nowhere: it is the rank
                pipe.dit.blocks.…, pipe.vace.vace_blocks.…              one file may have both
    mindspeed   blocks.0.self_attn.proj_q.lora_A.default.weight         with alpha nowhere, and free

Beside the factors, files under the names of ComfyUI and kohya may hold whole differences, as distilled models are
published (LightX2V's extractor, Kijai's): `head.head.diff` is added to `head.head.weight`, `….diff_b` to `….bias`, and
`blocks.0.diff_m` to `blocks.0.modulation`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mm_convert.families import FAMILIES, Family
from mm_convert.tensors.rules import LETTERS, Patterns, Row

PEFT = "base_model.model."  # what peft writes before the name of every module
PREFIXES = {  # what comes before the name of a module -> format; of several that fit, the first
    PEFT: "peft",
    "transformer.": "diffusers",
    "transformer_2.": "diffusers",  # the low-noise expert
    "diffusion_model.": "comfyui",
    "lora_unet__": "kohya",  # of VideoX-Fun
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "lycoris_": "kohya",
    "pipe.dit.": "diffsynth",
    "pipe.vace.": "diffsynth",
    "pipe.dit2.": "diffsynth",  # the low-noise expert
    "pipe.vace2.": "diffsynth",
    "dit.": "diffsynth",
    "vace.": "diffsynth",
}
_FLAT = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")  # under which names have lost their dots
_ONE_MODEL = [
    {f"{pipe}dit{number}.", f"{pipe}vace{number}."} for pipe, number in (("pipe.", ""), ("pipe.", "2"), ("", ""))
]
_LOW = ("transformer_2.", "pipe.dit2.", "pipe.vace2.")
_TEXT = ("lora_te", "text_encoder", "te_", "conditioner.")  # before the modules of a text encoder
# What trainers wrap around a model, or around its layers: it is no part of a name.
_WRAPPERS = re.compile(
    r"^(module\.|generator(_ema)?\.|model\.(?=(diffusion|base)_model\.|blocks\.|vace_blocks\.))+"
    r"|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PARTS = {"lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B"}
_FACTOR = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})(\.(?P<adapter>[^.]+))?\.weight")
_ALPHAS = (".alpha", ".lora_alpha", ".network_alpha")
DIFFERENCES = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}  # a parameter of a module -> its difference
_DIFFERENCE = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(DIFFERENCES.values())})")
_OTHERS = {  # what an adapter may hold besides: a pattern of the name -> what that is
    r"\.lokr_": "Kronecker factors (LoKr)",
    r"\.hada_": "Hadamard factors (LoHa)",
    r"\.b?oft_": "orthogonal finetuning (OFT)",
    r"\.ia3_|\.on_input$": "scales of activations (IA3)",
    r"\.vera_": "scales between shared factors (VeRA)",
    r"\.lora_E\b|\.ranknum$": "singular values (AdaLoRA)",
    r"\.[ab][12]\.weight$": "four factors (GLoRA)",
    r"dora_scale|lora_magnitude_vector": "magnitudes of DoRA",
    r"\.lora_mid": "a third factor (Tucker)",
    r"\.lora_embedding_": "factors of an embedding",
    r"\.diff_b$": "a whole difference of a bias",
    r"\.diff_m$": "a whole difference of a modulation",
    r"\.diff$|\.[wb]_norm$": "a whole difference of a weight",
    r"\.set_weight$": "a whole weight",
    r"modules_to_save": "a whole trained module",
    r"\.bias$": "a bias",
}
_ADAPTERS = re.compile(
    r"\.lora\.(down|up)\.|\.(lora|lokr|hada|b?oft|dora|ia3|vera)_|\.diff(_b|_m)?$|\.[ab][12]\.weight$"
)
_NOT_TAKEN = (PEFT,)  # prefixes whose loaders know no whole differences
_ELSE = {  # modules of models that are not read: a pattern -> whose they are
    r"^(lora_)?te\d*_|text_model|^text_encoder|^encoder\.block": "a text encoder",
    r"(double|single)_blocks": "HunyuanVideo or Flux",
    r"single_transformer_blocks": "Flux or HunyuanVideo (diffusers)",
    r"joint_(transformer_)?blocks": "Stable Diffusion 3",
    r"(down|up|input|output)_blocks|mid(dle)?_block": "a UNet (Stable Diffusion)",
    r"transformer_blocks": "another transformer (LTX-Video, CogVideoX, Qwen-Image, …)",
    r"face_adapter|motion_encoder|pose_patch_embedding": "Wan2.2-Animate",
    r"audio_injector|casual_audio_encoder|cond_encoder": "Wan2.2-S2V",
    r"control_adapter|ref_conv": "Wan-Fun with camera or reference",
}
_FUSED = re.compile(r"(^|[._])((to|linear|attn)_)?(added_)?(qkv|kv|query_key_value)(_proj)?$|gate_up")
MERGE_THERE = (
    "merge it into its base with the tool that trained it (peft: merge_and_unload, LyCORIS: merge_to), and convert the "
    "merged model"
)
FILES = {  # the names that loaders look for; of MindSpeed-MM it is a tree
    "mm": "adapter_model.safetensors",  # with adapter_config.json beside it
    "peft": "adapter_model.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "comfyui": "lora.safetensors",  # any name will do
}
SHOWN = 5  # problems that an error names; the rest is counted


@dataclass(frozen=True)
class Names:
    """What the names of an adapter say. `modules` are as in the file, without prefix, and ours."""

    prefix: str
    family: Family
    dialect: str
    parts: dict[str, dict[str, str]]  # module as found -> part ("A", "B", "alpha") -> name of the tensor
    modules: dict[str, tuple[str, Row]]  # module as found -> our module, and the row of its weight
    differences: dict[str, tuple[str, Row]]  # tensor with a whole difference -> our parameter, and its row
    twofold: bool  # the names are those of MindSpeed-MM as well as of others
    wrapped: bool  # a trainer has wrapped the model: it is no file that loaders know

    @property
    def expert(self) -> str:
        """ "low", where the prefix is that of the expert for low noise; of the other, names do not tell."""
        return "low" if self.prefix in _LOW else ""

    @property
    def format(self) -> str:
        return PREFIXES.get(self.prefix) or {"original": "diffsynth"}.get(self.dialect, self.dialect)


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are an adapter, of whatever kind, or hold one."""
    return any(_ADAPTERS.search(name) for name in names)


def read_names(names: Iterable[str], where: str, meant: str = "") -> Names:
    """Recognise an adapter by the names of its tensors; `meant`: the family to take where they fit several alike.

    Raises ValueError for what is not plain LoRA, factors without their counterpart, and modules that no family has.
    """
    names = list(names)
    prefix, parts, whole = _split(names, where)
    wanted = [*((module, "A") for module in parts), *whole]
    scores: dict[tuple[str, str], dict[tuple[str, str], tuple[str, Row]]] = {}
    for family in FAMILIES:
        for dialect in family.table.dialects:
            scores[family.name, dialect] = _find(family, dialect, wanted, flat=prefix in _FLAT)
    (name, dialect), found = max(scores.items(), key=lambda item: (len(item[1]), item[0][0] == meant))
    family = next(f for f in FAMILIES if f.name == name)
    if unknown := [
        module if part == "A" else f"{module}.{part}" for module, part in wanted if (module, part) not in found
    ]:
        raise ValueError(_explain(unknown, found, family, dialect, where))
    twofold = not prefix and dialect != "mindspeed" and len(scores.get((name, "mindspeed"), ())) == len(found)
    wrapped = any(_WRAPPERS.search(name) for name in names)
    modules = {module: found[module, "A"] for module in parts}
    differences = {tensor: found[key] for key, tensor in whole.items()}
    return Names(prefix, family, dialect, parts, modules, differences, twofold, wrapped)


def rename(family: Family, dialect: str, modules: Iterable[str]) -> dict[str, str]:
    """Our modules -> their names in this dialect. Raises ValueError when it has none, or keeps several as one."""
    if dialect not in family.table.dialects:
        raise ValueError(f"{family.name} has no {dialect} names, but {', '.join(family.table.dialects)}")
    ours = _linears(family, family.table.dialects[0])
    finder, result = Patterns(ours), {}
    for module in modules:
        pattern, layer = finder.find(module)
        theirs = ours[pattern].names[dialect]
        if "#" in theirs:
            raise ValueError(f"{module} has no {dialect} name of its own: it is a part of {theirs.partition('#')[0]}")
        result[module] = theirs.removesuffix(".weight").format(i=layer, j=layer)
    return result


def rename_parameters(family: Family, dialect: str, parameters: Iterable[str]) -> dict[str, str]:
    """Our parameters -> their names in this dialect. ValueError as `rename`."""
    rows = {row.name: row for row in family.table.rows}
    finder, result = Patterns(rows), {}
    for parameter in parameters:
        pattern, layer = finder.find(parameter)
        result[parameter] = rows[pattern].names[dialect].format(i=layer, j=layer)
    return result


def _split(names: list[str], where: str) -> tuple[str, dict[str, dict[str, str]], dict[tuple[str, str], str]]:
    """The prefix of all names, the parts of each module, and the whole differences by module and part."""
    bare = {name: _WRAPPERS.sub("", name) for name in names}
    prefixes = {next((p for p in PREFIXES if short.startswith(p)), ""): name for name, short in bare.items()}
    if len(prefixes) > 1 and not any(set(prefixes) <= one for one in _ONE_MODEL):
        raise ValueError(
            f"{where} mixes adapters of several kinds: it holds {join_first(list(prefixes.values()))}{_part(prefixes)}"
        )
    parts: dict[str, dict[str, str]] = {}
    whole: dict[tuple[str, str], str] = {}
    foreign: dict[str, str] = {}
    adapters = set()
    for name, short in bare.items():
        short = short.removeprefix(next((p for p in prefixes if p and short.startswith(p)), ""))
        if match := _FACTOR.fullmatch(short):
            module, part = match["module"], _PARTS[match["part"]]
            adapters.add(match["adapter"])
        elif ending := next((e for e in _ALPHAS if short.endswith(e)), ""):
            module, part = short.removesuffix(ending), "alpha"
        elif (match := _DIFFERENCE.fullmatch(short)) and not prefixes.keys() & {*_NOT_TAKEN}:
            whole[match["module"], match["part"]] = name
            continue
        else:
            foreign[name] = next((what for piece, what in _OTHERS.items() if re.search(piece, name)), "")
            continue
        if part in (factors := parts.setdefault(module, {})) and len(adapters) == 1:
            raise ValueError(f"{where} has {part} of {module} twice: {factors[part]} and {name}")
        factors[part] = name
    if foreign:
        kind = re.search(r"\((\w+)\)$|(DoRA)$", next(iter(foreign.values())))
        called = f"this is a {kind[1] or kind[2]} adapter, " if kind else ""
        has = join_first([f"{name} ({what})" if what else name for name, what in foreign.items()])
        raise ValueError(
            f"{where} is more than plain LoRA, which alone can be converted: {called}it has {has}. To use it, "
            + MERGE_THERE
        )
    if len(adapters) > 1:
        raise ValueError(f"{where} holds several adapters: {', '.join(sorted(map(str, adapters)))}; keep one of them")
    if not parts and not whole:
        raise ValueError(f"{where} holds no tensors")
    single = [
        f"{next(iter(factors.values()))} without its {part}"
        for module, factors in parts.items()
        for part in "AB"
        if part not in factors
    ]
    if single:
        raise ValueError(f"{where} is incomplete: it has {join_first(single)}")
    return next(iter(prefixes), ""), parts, whole


def _part(prefixes: Mapping[str, str]) -> str:
    """What to do with a file that holds adapters of several models."""
    if any(name.startswith(_TEXT) for name in prefixes.values()):
        return ". Some are of a text encoder, which cannot be adapted here: save those of the transformer alone"
    if any(low in prefixes for low in _LOW):
        low = [prefix for prefix in prefixes if prefix in _LOW]
        return (
            f". {', '.join(low)} is the expert for low noise: save each expert in a file of its own, and put them into "
            "high_noise_model/ and low_noise_model/"
        )
    return ": save each in a file of its own"


def _explain(unknown: Sequence[str], known: Mapping[str, object], family: Family, dialect: str, where: str) -> str:
    """What modules that no family has may be, and what to do."""
    whose = next((whose for piece, whose in _ELSE.items() if any(re.search(piece, m) for m in unknown)), "")
    seems = f". It seems to be an adapter of {whose}" if whose else ""
    if not known:
        families = ", ".join(f.name for f in FAMILIES)
        return f"{where} is no LoRA of a family that is known ({families}): it has {join_first(unknown)}{seems}"
    if fused := [module for module in unknown if _FUSED.search(module)]:
        return (
            f"{where} has adapters of fused linears, several in one matrix, which {family.name} ({dialect} names) has "
            f"one by one: {join_first(fused)}. To use it, {MERGE_THERE}"
        )
    return (
        f"{where} is no LoRA of a family that is known, the nearest being {family.name} ({dialect} names): it has "
        + join_first([_add_nearest(m, _linears(family, dialect)) for m in unknown[:SHOWN]], len(unknown))
        + seems
    )


def _linears(family: Family, dialect: str) -> dict[str, Row]:
    """What an adapter can stand beside: patterns of modules in this dialect, and the rows of their weights."""
    return {
        row.names[dialect].removesuffix(".weight"): row
        for row in family.table.rows
        if row.names[dialect].endswith(".weight") and len(row.shape.split()) > 1
    }


def _differing(family: Family, dialect: str) -> dict[str, Row]:
    """What a whole difference can be added to: patterns of modules in this dialect with the part, and the rows."""
    return {
        f"{row.names[dialect].rpartition('.')[0]}.{part}": row
        for row in family.table.rows
        if (part := DIFFERENCES.get(row.name.rpartition(".")[2])) and "#" not in row.names[dialect]
    }


def _find(
    family: Family, dialect: str, wanted: Iterable[tuple[str, str]], flat: bool
) -> dict[tuple[str, str], tuple[str, Row]]:
    """Those of the modules and parts ("A", or a difference) that this dialect knows, with our name and row: of factors
    that of the module, of a difference that of the parameter.
    """
    linears, differing, ours = _linears(family, dialect), _differing(family, dialect), family.table.dialects[0]
    finder, found = Patterns([*linears, *differing]), {}
    dotted = {pattern.replace(".", "_"): pattern for pattern in linears}
    dotted |= {pattern.rpartition(".")[0].replace(".", "_"): pattern.rpartition(".")[0] for pattern in differing}
    for module, part in wanted:
        name = _with_dots(module, dotted) if flat else module
        if part == "A":
            pattern, layer = finder.find(name)
            if pattern in linears:
                row = linears[pattern]
                found[module, part] = (row.names[ours].removesuffix(".weight").format(i=layer, j=layer), row)
            continue
        pattern, layer = finder.find(f"{name}.{part}")
        if pattern in differing:
            row = differing[pattern]
            found[module, part] = (row.names[ours].format(i=layer, j=layer), row)
    return found


def _with_dots(module: str, flattened: Mapping[str, str]) -> str:
    """`blocks_7_ffn_0` -> `blocks.7.ffn.0`, as far as a pattern says where the dots were."""
    number = re.search(r"_(\d+)(?=_|$)", module)
    for letter in ("", *LETTERS) if number else ("",):
        key = re.sub(r"_\d+(?=_|$)", f"_{{{letter}}}", module, count=1) if letter else module
        if key in flattened:
            return flattened[key].replace(f"{{{letter}}}", number[1]) if letter else flattened[key]
    return module


def _add_nearest(module: str, patterns: Iterable[str]) -> str:
    _, layer = Patterns(patterns).find(module)
    near = difflib.get_close_matches(module, [p.format(i=max(layer, 0), j=max(layer, 0)) for p in patterns], 1, 0)
    return f"{module} (nearest: {near[0]})"


def join_first(items: Sequence[str], count: int | None = None) -> str:
    """The first items, and how many more there are."""
    more = (count or len(items)) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")

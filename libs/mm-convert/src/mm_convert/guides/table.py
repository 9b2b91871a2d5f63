"""The commands of MindSpeed-MM's guides: one row each, over the fields of `cli.options.Convert`.

A row says which of the fields the command has as options, under which names, and what the others are. An option that
is not in the row does not exist for its command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

SAME: Any = object()  # as the field has it
REQUIRED: Any = MISSING

Layout = Literal["mm", "mindspeed"]


class Flag(NamedTuple):
    """An option: the field that it sets, its own name, help, type and default where they are others.

    `means`: what the field becomes for a value of the option. A field that `Convert` does not have is for the caller.
    """

    field: str
    name: str = ""
    help: str = ""
    hint: Any = SAME
    default: Any = SAME
    means: Mapping[Any, Any] = {}


@dataclass(frozen=True)
class Command:
    """A row.

    Attributes:
        help: what it does, in one line.
        flags: its options, besides `WRITING`, which every command has.
        fixed: fields without an option, and their values.
        aliases: other spelling of an option -> its name.
        groups: table of options -> what its help says.
    """

    help: str
    flags: tuple[Flag, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)


WRITING = (Flag("dtype"), Flag("overwrite"), Flag("dry_run"), Flag("sha256"))

_CFG = "Where from, where to."
_SPLIT = {"cfg": _CFG, "cfg.target_parallel_config": "How the target is split."}
_LISTS = "How a checkpoint is split. Lists are flat, or one list per virtual stage; [] for both: no stages."
_QWEN = {f"cfg.{name}": _LISTS for name in ("parallel_config", "source_parallel_config", "target_parallel_config")}
_QWEN |= {"cfg": _CFG, "cfg.hf_config": "A model of the hub."}

_SOURCE = Flag("source", "cfg.source_path")
_PUBLISHED = "published files, of any names; of two experts (A14B), the folder of one"
_SPLITTABLE = "our own folder, a MindSpeed-MM tree, or a torch DCP folder; however it is split"
_TRAINED = "our own folder, a MindSpeed-MM tree, a torch DCP folder, or a run of mm_train; however it is split"
_TARGET = Flag("target", "cfg.target_path", "the folder to make")
_IN_PLACE = "the folder to make; the same as source_path: published files stay, the others go beside them"
_LIKE = (
    "the published model, whose names, grouping into files, config.json and tokenizer are taken; null: its names alone"
)
_LAYOUT = Flag("to", "cfg.target_layout", "mm: our own files; mindspeed: MindSpeed-MM's tree, names and slices", Layout)
_AS = "mm: our own files; mindspeed: MindSpeed-MM's tree; null: as the source"
_AS_SOURCE = Flag("to", "cfg.target_layout", _AS, Layout | None, None)
_LISTED = "[10,10,10,10], or one list per virtual stage: [[5,5,5,5],[5,5,5,5]]; []: no stages"
_PP = Flag("pp_layers", "cfg.target_parallel_config.pp_layers", f"layers of each pipeline stage: {_LISTED}")
_TP = Flag("tp_size", "cfg.target_parallel_config.tp_size")
_ALIASES = {  # of the field of a split
    _PP.field: dict.fromkeys(("pp_layers", "cfg.pp_layers"), _PP.name),
    _TP.field: dict.fromkeys(("tp_size", "cfg.tp_size"), _TP.name),
}


def _hf_to_mm(family: str, split: Flag) -> Command:
    return Command(
        "Published files to our own layout, or to MindSpeed-MM's.",
        (_SOURCE._replace(help=_PUBLISHED), _TARGET._replace(help=_IN_PLACE), _LAYOUT, split),
        {"takes": "model", "family": family, "published": True},
        _ALIASES[split.field],
        _SPLIT,
    )


def _mm_to_hf(family: str, to: str) -> Command:
    return Command(
        "Our own layout, or MindSpeed-MM's, to published names and files.",
        (
            _SOURCE._replace(help=_TRAINED),
            _TARGET._replace(help="the folder to make; a name in .pt or .safetensors makes one file"),
            Flag("like", "cfg.hf_dir", _LIKE),
        ),
        {"takes": "model", "family": family, "to": to},
        {"cfg.hf_path": "cfg.hf_dir"},
        _SPLIT,
    )


def _resplit(family: str, split: Flag, like: str = "") -> Command:
    return Command(
        f"The same weights, split otherwise{like}; the present split is seen from the files.",
        (_SOURCE._replace(help=_SPLITTABLE), _TARGET, _AS_SOURCE, split),
        {"takes": "model", "family": family},
        _ALIASES[split.field],
        _SPLIT,
    )


def _mm_to_dcp(family: str) -> Command:
    return Command(
        "To a torch DCP folder with MindSpeed-MM's names, of which every rank reads its own part.",
        (_SOURCE._replace(help="any checkpoint of this family"), _TARGET),
        {"takes": "model", "family": family, "to": "dcp"},
        groups=_SPLIT,
    )


def _layerzero_to_mm(family: str) -> Command:
    ours = _AS_SOURCE._replace(help="mm, null: our own files; mindspeed: MindSpeed-MM's tree", means={None: "mm"})
    begins = "what the names of the model begin with, if with something else than predictor or model"
    average = "the moving average of the weights instead of the last ones"
    return Command(
        "A sharded training checkpoint (torch DCP, or joined by MindSpeed's convert_to_megatron.py) to our own layout.",
        (
            *(_SOURCE._replace(help=_SPLITTABLE), _TARGET, ours, _PP),
            Flag("iteration", help="the training step to take; null: the newest"),
            Flag("prefix", help=begins),
            Flag("part", "ema_model", average, bool, False, {True: "ema", False: "model"}),
        ),
        {"takes": "model", "family": family, "steps": True},
        _ALIASES[_PP.field],
        _SPLIT,
    )


def _wan_like(family: str, to: str) -> dict[str, Command]:
    return {
        "hf_to_mm": _hf_to_mm(family, _PP),
        "mm_to_hf": _mm_to_hf(family, to),
        "resplit": _resplit(family, _PP),
        "mm_to_dcp": _mm_to_dcp(family),
        "dcp_to_mm": _resplit(family, _PP),
        "layerzero_to_mm": _layerzero_to_mm(family),
    }


_ADAPTER = (_SOURCE._replace(help="the adapter, in any format: a file or folder"), _TARGET)
_ALPHA = Flag("lora_alpha", help="as trained, where the file does not say it")
_COMPARED = "as trained; null: from the files, which must say it then. Compared with them where they do."
_AS_BASE = "mm: our own files; mindspeed: MindSpeed-MM's tree; null: as the base if that is MindSpeed-MM's, else ours"

_LORA = {
    "merge_lora_to_base": Command(
        "Add an adapter to its base: W becomes W + alpha/rank * B A, summed in float32 (needs torch).",
        (
            _SOURCE._replace(help="the base: any checkpoint of the family"),
            Flag("lora", "cfg.lora_path", "the adapter, in any format", Path, REQUIRED),
            *(_TARGET, _AS_SOURCE._replace(help=_AS_BASE), _PP),
            Flag("lora_rank", help="as trained; null: from the files. Compared with them."),
            Flag("lora_alpha", help=_COMPARED),
        ),
        {"takes": "model", "family": "wan"},
        _ALIASES[_PP.field],
        _SPLIT,
    ),
    "lora_hf_to_mm": Command(
        "A published adapter (diffusers, ComfyUI, DiffSynth, peft) to our own format, or to MindSpeed-MM's.",
        (
            *_ADAPTER,
            Flag(
                "to",
                "target_layout",
                "mm: a folder that peft reads too; mindspeed: MindSpeed-MM's tree and names",
                Layout,
            ),
            _ALPHA,
        ),
        {"takes": "adapter", "family": "wan"},
        groups=_SPLIT,
    ),
    "lora_mm_to_hf": Command(
        "Our adapter, or MindSpeed-MM's, to a published format; a target in .safetensors makes one file.",
        (*_ADAPTER, Flag("to", "", "the format", Literal["diffusers", "comfyui", "peft"], "diffusers"), _ALPHA),
        {"takes": "adapter", "family": "wan"},
        groups=_SPLIT,
    ),
}


def _qwen_split(table: str, of: str = "") -> tuple[Flag, Flag, Flag]:
    """How a checkpoint is split, as options of a table. `of`: "source_" where the files say it already."""
    return (
        Flag(f"{of}pp_layers", f"cfg.{table}.llm_pp_layers", "language layers of each pipeline stage"),
        Flag(f"{of}vit_pp_layers", f"cfg.{table}.vit_pp_layers", "vision layers of each pipeline stage"),
        Flag(f"{of}tp_size", f"cfg.{table}.tp_size", "tensor-parallel ranks"),
    )


_HUB = Flag("source", "cfg.hf_config.hf_dir", "its folder, with *.safetensors and config.json", Path, REQUIRED)
_OURS = "our own folder, or a MindSpeed-MM tree"

_QWEN_COMMANDS = {
    "hf_to_mm": Command(
        "Published files to our own layout, or to MindSpeed-MM's.",
        (_TARGET._replace(name="cfg.mm_dir"), _HUB, *_qwen_split("parallel_config"), _LAYOUT),
        {"takes": "model", "family": "qwen2.5-vl", "published": True},
        groups=_QWEN,
    ),
    "mm_to_hf": Command(
        "To the files of the hub. How mm_dir is split is seen from it; parallel_config, if given, must agree.",
        (
            Flag("source", "cfg.mm_dir", f"{_OURS}; however it is split"),
            _TARGET._replace(name="cfg.save_hf_dir"),
            _HUB._replace(field="like"),
            *_qwen_split("parallel_config", of="source_"),
        ),
        {"takes": "model", "family": "qwen2.5-vl"},
        groups=_QWEN,
    ),
    "resplit": Command(
        "The same weights, split otherwise. The present split is seen; source_parallel_config, if given, must agree.",
        (
            *(Flag("source", "cfg.source_dir", _OURS), _TARGET._replace(name="cfg.target_dir")),
            *_qwen_split("source_parallel_config", of="source_"),
            *_qwen_split("target_parallel_config"),
            _AS_SOURCE,
        ),
        {"takes": "model", "family": "qwen2.5-vl"},
        groups=_QWEN,
    ),
}

_EMA = {True: "ema_state_dict", False: "state_dict"}
VAE = {"takes": "model", "family": "opensoraplan-vae"}

CONVERTERS: dict[str, dict[str, Command]] = {
    "WanConverter": {**_wan_like("wan", to="diffusers"), **_LORA},
    "VACEConverter": {
        **_wan_like("vace", to="original"),
        "hf_diffusers_to_mm": _hf_to_mm("vace", _PP),
        "mm_to_hf_diffusers": _mm_to_hf("vace", to="diffusers"),
    },
    "OpenSoraPlanConverter": {
        "hf_to_mm": _hf_to_mm("opensoraplan", _TP),
        "mm_to_hf": _mm_to_hf("opensoraplan", to="original"),
        "resplit": _resplit("opensoraplan", _TP, " (MindSpeed-MM's split and merge)"),
        "vae_convert": Command(
            "The VAE of Open-Sora-Plan 1.2.",
            (
                _SOURCE._replace(help="checkpoint.ckpt of the VAE, or its folder"),
                _TARGET,
                _LAYOUT._replace(help="mm: our own files; mindspeed: casualvae_mm.pt"),
                Flag("part", "use_ema_model", "take the moving average, where the file has one", bool, True, _EMA),
            ),
            VAE,
            groups=_SPLIT,
        ),
    },
    "Qwen2_5_VLConverter": _QWEN_COMMANDS,
}

# --- the older scripts

CONVERT_CKPT = Command(
    "Published Wan files to our own layout or MindSpeed-MM's, and back.",
    (
        Flag("mode", "", "the direction", Literal["convert_to_mm", "convert_to_hf"], REQUIRED),
        Flag(
            "source",
            "source_path",
            "convert_to_mm: the published transformer folder; convert_to_hf: what was trained",
        ),
        Flag(
            "target",
            "target_path",
            "the folder to make; convert_to_mm may name source_path: what is made stands beside the published files",
        ),
        Flag(
            "like",
            "ckpt_path",
            "convert_to_hf: the published transformer folder, whose names, files and config.json are taken",
        ),
        Flag(
            "pp_layers",
            "pp_vpp_layers",
            "convert_to_mm: layers of each pipeline stage: [7,8,8,7], or one list per virtual stage: [[7,8],[7,8]]",
        ),
        Flag(
            "to", "target_layout", "convert_to_mm: mm: our own files; mindspeed: MindSpeed-MM's tree and names", Layout
        ),
    ),
    {"takes": "model", "family": "wan"},
)

# The defaults are MindSpeed-MM's: published files are under ./raw_ckpt, what is made goes under ./ckpt.
_RAW, _OSP = Path("raw_ckpt/open-sora-plan"), Path("ckpt/open-sora-plan-12")
_VAE_FILE, _DIT_FILE = _RAW / "vae/checkpoint.ckpt", _RAW / "93x480p/diffusion_pytorch_model.safetensors"

CONVERT_CKPT_TO_MM = Command(
    "Open-Sora-Plan 1.2: published files to our own layout or MindSpeed-MM's, and its ranks joined again.",
    (
        Flag(
            "mode",
            "",
            "split: from the published files, for tp_size ranks; merge: ranks into one",
            Literal["split", "merge"],
            "split",
        ),
        Flag("tp_size", "", "split: tensor-parallel ranks to make; merge: those that there are, if given"),
        Flag("dit_hg_weight_path", "", "split: the published transformer, a file or folder", Path, _DIT_FILE),
        Flag("dit_mm_save_path", "", "split: the folder to make of it", Path, _OSP / "93x480p"),
        Flag("vae", "vae_convert", "split: convert the VAE too", bool, True),
        Flag("vae_hg_weight_path", "", "split: the published VAE", Path, _VAE_FILE),
        Flag("vae_mm_save_path", "", "split: the folder to make of it", Path, Path("ckpt/vae")),
        Flag("dit_mm_weight_path", "", "merge: what is split", Path, _OSP / "93x480p"),
        Flag("dit_merge_save_path", "", "merge: the folder to make", Path, _OSP / "merge"),
        _LAYOUT._replace(name="target_layout"),
    ),
)

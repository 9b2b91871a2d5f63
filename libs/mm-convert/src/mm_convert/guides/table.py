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

    `means`: what the field becomes for a value of the option. `also`: other spellings of the name. A field that
    `Convert` does not have is for the caller.
    """

    field: str
    name: str = ""
    help: str = ""
    hint: Any = SAME
    default: Any = SAME
    means: Mapping[Any, Any] = {}
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A row: what it does, its options besides `WRITING`, and the values of fields that have no option."""

    help: str
    flags: tuple[Flag, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)


WRITING = (Flag("dtype"), Flag("overwrite"), Flag("dry_run"), Flag("sha256"))  # of every command that writes

_LISTS = "How a checkpoint is split. Lists are flat, or one list per virtual stage; [] for both: no stages."
GROUPS = {  # table of options -> what its help says
    "cfg": "Where from, where to.",
    "cfg.hf_config": "A model of the hub.",
    "cfg.parallel_config": _LISTS,
    "cfg.source_parallel_config": _LISTS,
    "cfg.target_parallel_config": "How the target is split.",
}

# --- what several commands have

_LAYOUT = "mm: our own files; mindspeed: MindSpeed-MM's tree, names and slices"
_OR_SAME = "mm: our own files; mindspeed: MindSpeed-MM's tree; null: as the source"
_LISTED = "[10,10,10,10], or one list per virtual stage: [[5,5,5,5],[5,5,5,5]]; []: no stages"
_SPLITTABLE = "our own folder, a MindSpeed-MM tree, or a torch DCP folder; however it is split"
_LIKE = "the published model, whose names, grouping into files, config.json and tokenizer are taken; null: its names"

_SOURCE = Flag("source", "cfg.source_path", _SPLITTABLE)
_TARGET = Flag("target", "cfg.target_path", "the folder to make")
_TO = Flag("to", "cfg.target_layout", _LAYOUT, Layout)
_TO_OR_SAME = Flag("to", "cfg.target_layout", _OR_SAME, Layout | None, None)
_PP = Flag(
    "pp_layers",
    "cfg.target_parallel_config.pp_layers",
    f"layers of each pipeline stage: {_LISTED}",
    also=("pp_layers", "cfg.pp_layers"),
)
_TP = Flag("tp_size", "cfg.target_parallel_config.tp_size", also=("tp_size", "cfg.tp_size"))


def _model(family: str, **fixed: Any) -> dict[str, Any]:
    return {"takes": "model", "family": family, **fixed}


def _hf_to_mm(family: str, split: Flag) -> Command:
    published = "published files, of any names; of two experts (A14B), the folder of one"
    target = "the folder to make; the same as source_path: published files stay, the others go beside them"
    return Command(
        "Published files to our own layout, or to MindSpeed-MM's.",
        (_SOURCE._replace(help=published), _TARGET._replace(help=target), _TO, split),
        _model(family, published=True),
    )


def _mm_to_hf(family: str, to: str) -> Command:
    made = "our own folder, a MindSpeed-MM tree, a torch DCP folder, or a run of mm_train; however it is split"
    target = "the folder to make; a name in .pt or .safetensors makes one file"
    like = Flag("like", "cfg.hf_dir", f"{_LIKE} alone", also=("cfg.hf_path",))
    return Command(
        "Our own layout, or MindSpeed-MM's, to published names and files.",
        (_SOURCE._replace(help=made), _TARGET._replace(help=target), like),
        _model(family, to=to),
    )


def _resplit(family: str, split: Flag, like: str = "") -> Command:
    return Command(
        f"The same weights, split otherwise{like}; the present split is seen from the files.",
        (_SOURCE, _TARGET, _TO_OR_SAME, split),
        _model(family),
    )


def _mm_to_dcp(family: str) -> Command:
    return Command(
        "To a torch DCP folder with MindSpeed-MM's names, of which every rank reads its own part.",
        (_SOURCE._replace(help="any checkpoint of this family"), _TARGET),
        _model(family, to="dcp"),
    )


def _layerzero_to_mm(family: str) -> Command:
    to = _TO_OR_SAME._replace(help="mm, null: our own files; mindspeed: MindSpeed-MM's tree", means={None: "mm"})
    begin = "what the names of the model begin with, if with something else than predictor or model"
    average = "the moving average of the weights instead of the last ones"
    return Command(
        "A sharded training checkpoint (torch DCP, or joined by MindSpeed's convert_to_megatron.py) to our own layout.",
        (
            *(_SOURCE, _TARGET, to, _PP),
            Flag("iteration", "", "the training step to take; null: the newest"),
            Flag("prefix", "", begin),
            Flag("part", "ema_model", average, bool, False, {True: "ema", False: "model"}),
        ),
        _model(family, steps=True),
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


# --- LoRA

_WAN_LORA = {"takes": "adapter", "family": "wan"}
_FORMAT = Literal["diffusers", "comfyui", "peft"]
_AS_BASE = "mm: our own files; mindspeed: MindSpeed-MM's tree; null: as the base if that is MindSpeed-MM's, else ours"
_OF_FILES = "as trained; null: from the files, which must say it then. Compared with them where they do."
_TO_ADAPTER = "mm: a folder that peft reads too; mindspeed: MindSpeed-MM's tree and names"
_ALPHA = Flag("lora_alpha", "", "as trained, where the file does not say it")
_ADAPTER = (_SOURCE._replace(help="the adapter, in any format: a file or folder"), _TARGET)

_LORA = {
    "merge_lora_to_base": Command(
        "Add an adapter to its base: W becomes W + alpha/rank * B A, summed in float32 (needs torch).",
        (
            _SOURCE._replace(help="the base: any checkpoint of the family"),
            Flag("lora", "cfg.lora_path", "the adapter, in any format", Path, REQUIRED),
            *(_TARGET, _TO_OR_SAME._replace(help=_AS_BASE), _PP),
            Flag("lora_rank", "", "as trained; null: from the files. Compared with them."),
            Flag("lora_alpha", "", _OF_FILES),
        ),
        _model("wan"),
    ),
    "lora_hf_to_mm": Command(
        "A published adapter (diffusers, ComfyUI, DiffSynth, peft) to our own format, or to MindSpeed-MM's.",
        (*_ADAPTER, Flag("to", "target_layout", _TO_ADAPTER, Layout), _ALPHA),
        _WAN_LORA,
    ),
    "lora_mm_to_hf": Command(
        "Our adapter, or MindSpeed-MM's, to a published format; a target in .safetensors makes one file.",
        (*_ADAPTER, Flag("to", "", "the format", _FORMAT, "diffusers"), _ALPHA),
        _WAN_LORA,
    ),
}

# --- Qwen2.5-VL


def _qwen_split(table: str, of: str = "") -> tuple[Flag, Flag, Flag]:
    """How a checkpoint is split, as options of a table. `of`: "source_" where the files say it already."""
    return (
        Flag(f"{of}pp_layers", f"cfg.{table}.llm_pp_layers", "language layers of each pipeline stage"),
        Flag(f"{of}vit_pp_layers", f"cfg.{table}.vit_pp_layers", "vision layers of each pipeline stage"),
        Flag(f"{of}tp_size", f"cfg.{table}.tp_size", "tensor-parallel ranks"),
    )


_HUB = Flag("source", "cfg.hf_config.hf_dir", "its folder, with *.safetensors and config.json", Path, REQUIRED)
_OURS = Flag("source", "cfg.mm_dir", "our own folder, or a MindSpeed-MM tree; however it is split")

_QWEN = {
    "hf_to_mm": Command(
        "Published files to our own layout, or to MindSpeed-MM's.",
        (_TARGET._replace(name="cfg.mm_dir"), _HUB, *_qwen_split("parallel_config"), _TO),
        _model("qwen2.5-vl", published=True),
    ),
    "mm_to_hf": Command(
        "To the files of the hub. How mm_dir is split is seen from it; parallel_config, if given, must agree.",
        (
            *(_OURS, _TARGET._replace(name="cfg.save_hf_dir"), _HUB._replace(field="like")),
            *_qwen_split("parallel_config", of="source_"),
        ),
        _model("qwen2.5-vl"),
    ),
    "resplit": Command(
        "The same weights, split otherwise. The present split is seen; source_parallel_config, if given, must agree.",
        (
            *(_OURS._replace(name="cfg.source_dir"), _TARGET._replace(name="cfg.target_dir")),
            *_qwen_split("source_parallel_config", of="source_"),
            *(*_qwen_split("target_parallel_config"), _TO_OR_SAME),
        ),
        _model("qwen2.5-vl"),
    ),
}

# --- Open-Sora-Plan 1.2

VAE = _model("opensoraplan-vae")
_EMA = {True: "ema_state_dict", False: "state_dict"}

_VAE_CONVERT = Command(
    "The VAE of Open-Sora-Plan 1.2.",
    (
        *(_SOURCE._replace(help="checkpoint.ckpt of the VAE, or its folder"), _TARGET),
        _TO._replace(help="mm: our own files; mindspeed: casualvae_mm.pt"),
        Flag("part", "use_ema_model", "take the moving average, where the file has one", bool, True, _EMA),
    ),
    VAE,
)

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
        "vae_convert": _VAE_CONVERT,
    },
    "Qwen2_5_VLConverter": _QWEN,
}

# --- the older scripts

_PUBLISHED = "the published transformer folder"
_BESIDE = "the folder to make; convert_to_mm may name source_path: what is made stands beside the published files"
_STAGES = "layers of each pipeline stage: [7,8,8,7], or one list per virtual stage: [[7,8],[7,8]]"

CONVERT_CKPT = Command(
    "Published Wan files to our own layout or MindSpeed-MM's, and back.",
    (
        Flag("mode", "", "the direction", Literal["convert_to_mm", "convert_to_hf"], REQUIRED),
        Flag("source", "source_path", f"convert_to_mm: {_PUBLISHED}; convert_to_hf: what was trained"),
        Flag("target", "target_path", _BESIDE),
        Flag("like", "ckpt_path", f"convert_to_hf: {_PUBLISHED}, whose names, files and config.json are taken"),
        Flag("pp_layers", "pp_vpp_layers", f"convert_to_mm: {_STAGES}"),
        _TO._replace(name="target_layout", help="convert_to_mm: mm: our own files; mindspeed: MindSpeed-MM's tree"),
    ),
    _model("wan"),
)

# The defaults are MindSpeed-MM's: published files are under ./raw_ckpt, what is made goes under ./ckpt.
_RAW, _OSP = Path("raw_ckpt/open-sora-plan"), Path("ckpt/open-sora-plan-12")
_VAE_FILE, _DIT_FILE = _RAW / "vae/checkpoint.ckpt", _RAW / "93x480p/diffusion_pytorch_model.safetensors"
_MODE = "split: from the published files, for tp_size ranks; merge: ranks into one"

CONVERT_CKPT_TO_MM = Command(
    "Open-Sora-Plan 1.2: published files to our own layout or MindSpeed-MM's, and its ranks joined again.",
    (
        Flag("mode", "", _MODE, Literal["split", "merge"], "split"),
        Flag("tp_size", "", "split: tensor-parallel ranks to make; merge: those that there are, if given"),
        Flag("dit_hg_weight_path", "", "split: the published transformer, a file or folder", Path, _DIT_FILE),
        Flag("dit_mm_save_path", "", "split: the folder to make of it", Path, _OSP / "93x480p"),
        Flag("vae", "vae_convert", "split: convert the VAE too", bool, True),
        Flag("vae_hg_weight_path", "", "split: the published VAE", Path, _VAE_FILE),
        Flag("vae_mm_save_path", "", "split: the folder to make of it", Path, Path("ckpt/vae")),
        Flag("dit_mm_weight_path", "", "merge: what is split", Path, _OSP / "93x480p"),
        Flag("dit_merge_save_path", "", "merge: the folder to make", Path, _OSP / "merge"),
        _TO._replace(name="target_layout"),
    ),
)

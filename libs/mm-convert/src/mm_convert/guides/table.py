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

_LISTS = "How a checkpoint is split. A list is flat, or holds one list per virtual stage; [] for both: no stages."
GROUPS = {  # table of options -> what its help says
    "cfg": "Source and target.",
    "cfg.hf_config": "A model of the hub.",
    "cfg.parallel_config": _LISTS,
    "cfg.source_parallel_config": _LISTS,
    "cfg.target_parallel_config": "How the target is split.",
}

# --- what several commands have

_LAYOUT = "mm: our own files; mindspeed: MindSpeed-MM's tree, names and slices"
_OR_SAME = "mm: our own files; mindspeed: MindSpeed-MM's tree; null: mindspeed if the source is, else mm"
_LISTED = "[10,10,10,10], or one list per virtual stage: [[5,5,5,5],[5,5,5,5]]; []: no stages"
_SPLITTABLE = "our own folder, a MindSpeed-MM tree, or a torch DCP folder, split in any way"
_LIKE = "published model that gives names, grouping into files, config.json and tokenizer; null: names"

_SOURCE = Flag("source", "cfg.source_path", _SPLITTABLE)
_TARGET = Flag("target", "cfg.target_path", "folder to make")
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
    published = "published files, under any names; for two experts (A14B), the folder of one"
    target = "folder to make; if it is source_path, published files stay and the others go beside them"
    return Command(
        "Convert published files to our own layout, or to MindSpeed-MM's.",
        (_SOURCE._replace(help=published), _TARGET._replace(help=target), _TO, split),
        _model(family, published=True),
    )


def _mm_to_hf(family: str, to: str) -> Command:
    made = "our own folder, a MindSpeed-MM tree, a torch DCP folder, or a run of mm_train, split in any way"
    target = "folder to make; a name that ends in .pt or .safetensors makes one file"
    like = Flag("like", "cfg.hf_dir", f"{_LIKE} alone", also=("cfg.hf_path",))
    return Command(
        "Convert our own layout, or MindSpeed-MM's, to published names and files.",
        (_SOURCE._replace(help=made), _TARGET._replace(help=target), like),
        _model(family, to=to),
    )


def _resplit(family: str, split: Flag, like: str = "") -> Command:
    return Command(
        f"Split the same weights otherwise{like}; the present split is read from the files.",
        (_SOURCE, _TARGET, _TO_OR_SAME, split),
        _model(family),
    )


def _mm_to_dcp(family: str) -> Command:
    return Command(
        "Write a torch DCP folder with MindSpeed-MM's names; every rank reads its own part of it.",
        (_SOURCE._replace(help="any checkpoint of this family"), _TARGET),
        _model(family, to="dcp"),
    )


def _layerzero_to_mm(family: str) -> Command:
    to = _TO_OR_SAME._replace(help="mm, null: our own files; mindspeed: MindSpeed-MM's tree", means={None: "mm"})
    begin = "what the names of the model begin with, if not with predictor or model"
    average = "take the moving average of the weights instead of the last ones"
    return Command(
        "Convert a sharded training checkpoint (torch DCP, or joined by MindSpeed's convert_to_megatron.py).",
        (
            *(_SOURCE, _TARGET, to, _PP),
            Flag("iteration", "", "training step to take; null: the newest"),
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

_FORMAT = Literal["diffusers", "comfyui", "peft"]
_AS_BASE = "mm: our own files; mindspeed: MindSpeed-MM's tree; null: mindspeed if the base is, else mm"
_OF_FILES = "as trained, compared with the files if they say it; null: the files must say it"
_TO_ADAPTER = "mm: a folder that peft reads too; mindspeed: MindSpeed-MM's tree and names"
_ALPHA = Flag("lora_alpha", "", "as trained, if the file does not say it")
_ADAPTER = (_SOURCE._replace(help="the adapter, in any format: a file or folder"), _TARGET)

# Of any family: the adapter and the base say themselves whether they fit.
_MERGE = Command(
    "Add an adapter to its base: W becomes W + alpha/rank * B A, summed in float32 (needs torch).",
    (
        _SOURCE._replace(help="the base, without the adapter: any checkpoint that it fits"),
        Flag("lora", "cfg.lora_path", "the adapter, in any format", Path, REQUIRED),
        *(_TARGET, _TO_OR_SAME._replace(help=_AS_BASE), _PP),
        Flag("lora_rank", "", "as trained, compared with the files; null: from the files"),
        Flag("lora_alpha", "", _OF_FILES),
    ),
    _model(""),
)


def _lora(family: str) -> dict[str, Command]:
    fixed = {"takes": "adapter", "family": family}
    return {
        "merge_lora_to_base": _MERGE,
        "lora_hf_to_mm": Command(
            "Convert a published adapter (diffusers, ComfyUI, kohya, DiffSynth, peft) to our format or MindSpeed-MM's.",
            (*_ADAPTER, Flag("to", "target_layout", _TO_ADAPTER, Layout), _ALPHA),
            fixed,
        ),
        "lora_mm_to_hf": Command(
            "Convert our adapter, or MindSpeed-MM's, to a published format; a target in .safetensors makes one file.",
            (*_ADAPTER, Flag("to", "", "the format", _FORMAT, "diffusers"), _ALPHA),
            fixed,
        ),
    }


# --- Qwen2.5-VL


def _qwen_split(table: str, of: str = "") -> tuple[Flag, Flag, Flag]:
    """How a checkpoint is split, as options of a table. `of`: "source_" where the files say it already."""
    return (
        Flag(f"{of}pp_layers", f"cfg.{table}.llm_pp_layers", "language layers of each pipeline stage"),
        Flag(f"{of}vit_pp_layers", f"cfg.{table}.vit_pp_layers", "vision layers of each pipeline stage"),
        Flag(f"{of}tp_size", f"cfg.{table}.tp_size", "number of tensor-parallel ranks"),
    )


_HUB = Flag("source", "cfg.hf_config.hf_dir", "its folder, with *.safetensors and config.json", Path, REQUIRED)
_OURS = Flag("source", "cfg.mm_dir", "our own folder, or a MindSpeed-MM tree, split in any way")

_QWEN = {
    "hf_to_mm": Command(
        "Convert published files to our own layout, or to MindSpeed-MM's.",
        (_TARGET._replace(name="cfg.mm_dir"), _HUB, *_qwen_split("parallel_config"), _TO),
        _model("qwen2.5-vl", published=True),
    ),
    "mm_to_hf": Command(
        "Convert to the files of the hub. The split is read from mm_dir; parallel_config, if given, must agree.",
        (
            *(_OURS, _TARGET._replace(name="cfg.save_hf_dir"), _HUB._replace(field="like")),
            *_qwen_split("parallel_config", of="source_"),
        ),
        _model("qwen2.5-vl"),
    ),
    "resplit": Command(
        "Split the same weights otherwise. The present split is read; source_parallel_config, if given, must agree.",
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
    "Convert the VAE of Open-Sora-Plan 1.2.",
    (
        *(_SOURCE._replace(help="checkpoint.ckpt of the VAE, or its folder"), _TARGET),
        _TO._replace(help="mm: our own files; mindspeed: casualvae_mm.pt"),
        Flag("part", "use_ema_model", "take the moving average, if the file has one", bool, True, _EMA),
    ),
    VAE,
)

CONVERTERS: dict[str, dict[str, Command]] = {
    "WanConverter": {**_wan_like("wan", to="diffusers"), **_lora("wan")},
    "VACEConverter": {
        **_wan_like("vace", to="original"),
        "hf_diffusers_to_mm": _hf_to_mm("vace", _PP),
        "mm_to_hf_diffusers": _mm_to_hf("vace", to="diffusers"),
        **_lora("vace"),
    },
    "OpenSoraPlanConverter": {
        "hf_to_mm": _hf_to_mm("opensoraplan", _TP),
        "mm_to_hf": _mm_to_hf("opensoraplan", to="original"),
        "resplit": _resplit("opensoraplan", _TP, " (MindSpeed-MM's split and merge)"),
        "vae_convert": _VAE_CONVERT,
        "merge_lora_to_base": _MERGE,
    },
    "Qwen2_5_VLConverter": {**_QWEN, "merge_lora_to_base": _MERGE},
}

# --- the older scripts

_PUBLISHED = "the published transformer folder"
_BESIDE = "folder to make; convert_to_mm may name source_path: what is made stands beside the published files"
_STAGES = "layers of each pipeline stage: [7,8,8,7], or one list per virtual stage: [[7,8],[7,8]]"

CONVERT_CKPT = Command(
    "Convert published Wan files to our own layout or MindSpeed-MM's, and back.",
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
    "Convert Open-Sora-Plan 1.2 to our own layout or MindSpeed-MM's, and join its ranks again.",
    (
        Flag("mode", "", _MODE, Literal["split", "merge"], "split"),
        Flag(
            "tp_size",
            "",
            "split: number of tensor-parallel ranks to make; merge: number of those that there are, if given",
        ),
        Flag("dit_hg_weight_path", "", "split: the published transformer, a file or folder", Path, _DIT_FILE),
        Flag("dit_mm_save_path", "", "split: folder to make of it", Path, _OSP / "93x480p"),
        Flag("vae", "vae_convert", "split: convert the VAE too", bool, True),
        Flag("vae_hg_weight_path", "", "split: the published VAE", Path, _VAE_FILE),
        Flag("vae_mm_save_path", "", "split: folder to make of it", Path, Path("ckpt/vae")),
        Flag("dit_mm_weight_path", "", "merge: what is split", Path, _OSP / "93x480p"),
        Flag("dit_merge_save_path", "", "merge: folder to make", Path, _OSP / "merge"),
        _TO._replace(name="target_layout"),
    ),
)

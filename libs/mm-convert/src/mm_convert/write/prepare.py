"""What converting would write: a checkpoint in another form, or like another, or with an adapter in it; an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert.families.family import Config, Family
from mm_convert.files import read_bytes, read_json
from mm_convert.lora.adapter import Adapter
from mm_convert.lora.base import check_base, describe_content
from mm_convert.lora.merging import merge
from mm_convert.lora.names import FILES
from mm_convert.lora.writing import lora_tensors
from mm_convert.read.experts import expert_of
from mm_convert.store.mindspeed import TRACKER, rank_files
from mm_convert.store.mm import FOLDER, MANIFEST, as_json
from mm_convert.store.safetensors import refuse_link_out
from mm_convert.store.torch_file import SUFFIXES
from mm_convert.tensors.stages import Layers, Split
from mm_convert.tensors.views import FP8, LazyTensor
from mm_convert.write.destinations import Folder, OneFile
from mm_convert.write.outputs import Files, Output, copy_file, describe, index_file, safetensors_file, text_file
from mm_convert.write.targets import FP8_SCALED, Target, cast_all, prepare_target, release, split_of

if TYPE_CHECKING:
    from mm_convert.read.checkpoint import Checkpoint


def prepare_conversion(
    checkpoint: Checkpoint,
    target: str | Path,
    to: str = "mm",
    *,
    pp_layers: Layers | Mapping[str, Layers] = (),
    tp_size: int = 1,
    shard_bytes: int | None = None,
    dtype: str | None = None,
) -> Files:
    """What `convert` would write; the notes on the checkpoint are among its own."""
    target, content = Path(target), checkpoint.content
    if to == "mindspeed" and content.family.mindspeed_file and target.suffix not in (*SUFFIXES, ".safetensors"):
        target = target / content.family.mindspeed_file
    tensors = checkpoint.tensors if dtype in (None, FP8_SCALED) else cast_all(checkpoint.tensors, dtype)
    wanted = Target(
        target,
        to,
        split_of(content.family, pp_layers, tp_size),
        shards=(list(checkpoint.shards.values()) or None) if checkpoint.layout in ("mm", "safetensors") else None,
        shard_bytes=shard_bytes,
        in_place=_is_in_place(target, checkpoint, to),
        metadata=_metadata(checkpoint),
        fp8_scaled=dtype == FP8_SCALED,
    )
    files = prepare_target(wanted, content, tensors, checkpoint.config, **_origin(checkpoint))
    files.needs_torch, files.decodes = dtype is not None or to == "dcp", bool(checkpoint.quantised)
    files.notes = [*checkpoint.notes, *files.notes]
    if dtype == FP8_SCALED and checkpoint.quantised:
        files.notes.append(f"what was {checkpoint.quantised} is rounded a second time")
    return files


def prepare_like(checkpoint: Checkpoint, target: str | Path, model: Checkpoint, *, dtype: str | None = None) -> Files:
    """What gives a checkpoint the names, the files and the config.json of another, published one.

    Raises ValueError when the two have other tensors or shapes.
    """
    target = Path(target)
    if model.layout != "safetensors":
        raise ValueError(f"{model.path} holds no published safetensors files to copy the names of")
    published = model.content.translate(model.dialect)
    for name, tensor in model.tensors.items():
        if name not in checkpoint.tensors or checkpoint.shape(name) != tensor.shape:
            there = list(checkpoint.shape(name)) if name in checkpoint.tensors else "absent"
            raise ValueError(
                f"{model.path} is another model: its {published[name]} is {list(tensor.shape)}, "
                f"in {checkpoint.path} {there}"
            )
    if extra := set(checkpoint) - set(model):
        raise ValueError(f"{model.path} is another model: it has no {sorted(extra)[0]}")

    tensors = checkpoint.tensors if dtype is None else cast_all(checkpoint.tensors, dtype)
    shards: dict[str, dict[str, LazyTensor]] = {}
    for file, ours in model.shards.items():
        shards[file.name] = {published[name]: tensors[name] for name in ours}
    wanted = Target(
        target,
        model.dialect,
        in_place=_is_in_place(target, checkpoint, model.dialect),
        metadata=model.metadata,
    )
    config = {**checkpoint.config, **model.config}
    files = prepare_target(wanted, checkpoint.content, tensors, config, **_origin(checkpoint))
    files.notes = [*checkpoint.notes, *files.notes]
    if isinstance(files.destination, OneFile):
        return files
    if not (model.folder / "config.json").exists():
        raise ValueError(f"{model.folder} has no config.json to copy")
    files.outputs = [safetensors_file(name, contents, model.metadata) for name, contents in shards.items()]
    files.outputs += [index_file(path.name, shards) for path in model.folder.glob("*.safetensors.index.json")]
    files.outputs += [_config_like(model.folder / "config.json", dtype), *_copies(model.folder)]
    files.needs_torch = dtype is not None
    if model.content.ignored:
        first, reason = next(iter(model.content.ignored.items()))
        files.notes.append(f"{len(model.content.ignored)} tensors of {model.path} are left out ({reason}): {first}, …")
    return files


def prepare_merge(
    base: Checkpoint,
    adapter: Adapter,
    where: Path,
    target: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    **how: Any,
) -> Files:
    """What a base with the adapter at `where` in it would be, in the form `to`. Needs torch to be carried out.

    how: the other arguments of `prepare_conversion`.
    """
    import mm_convert.tensors.torch  # noqa: F401  # so that a missing torch is said before anything is written

    if dtype is not None:  # first, for sums in them would be lost in rounding; others are cast after it
        fp8 = {name: tensor for name, tensor in base.tensors.items() if tensor.dtype in FP8}
        base.tensors = {**base.tensors, **cast_all(fp8, "bfloat16" if dtype == FP8_SCALED else dtype)}
    of_base = check_base(adapter.trained_on, describe_content(base.tensors, adapter.modules), f"the adapter {where}")
    base.tensors = merge(base.tensors, adapter)
    files = prepare_conversion(base, target, to, dtype=dtype, **how)
    files.needs_torch = True
    whole = f", {len(adapter.differences)} whole differences added" if adapter.differences else ""
    files.notes += [*adapter.notes, *of_base, f"{len(adapter.modules)} weights are merged{whole}"]
    manifest = base.folder / MANIFEST
    before = read_json(manifest).get("merged", []) if manifest.exists() else []
    if before:
        files.notes.append(f"{base.path} has an adapter merged into it already: {before[-1]['source']}")
    files.manifests[""]["merged"] = [*before, {"source": str(where), "rank": adapter.rank, "alpha": adapter.alpha}]
    return files


def prepare_adapter(
    adapter: Adapter, source: str | Path | None, target: str | Path, to: str, dtype: str | None = None
) -> Files:
    """What writing an adapter in a format would write: a folder, or one file for a target in .safetensors.

    `source` is where the adapter lies; None if it lies in memory.
    """
    target = Path(target)
    here, there = Path(source or "memory").resolve(), target.resolve()
    if source and (here == there or there in here.parents or here in there.parents):
        raise ValueError(f"{target} is the adapter itself, or holds it, or lies in it; name another target")
    tensors, metadata, config = lora_tensors(adapter, to)
    if dtype is not None:  # of the factors; alpha is no weight
        tensors |= cast_all({name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}, dtype)
    more = {"metadata": metadata} if to == "mindspeed" else {}
    family = adapter.family
    about = describe(
        str(here) if source else "memory", family.name, {}, f"LoRA, {adapter.format}", f"LoRA, {to}", **more
    )
    files = Files(Folder(target), [], {"": about}, notes=list(adapter.notes))
    if to == "mindspeed":
        if target.suffix in (".safetensors", *SUFFIXES):
            raise ValueError(f"{target}: MindSpeed-MM's adapters are folders; name one")
        assert family.cuts
        files.outputs = release(rank_files([tensors], Split(), family.cuts))
        return files
    if target.suffix in SUFFIXES:
        raise ValueError(f"{target}: adapters are written as safetensors; name a folder, or a file in .safetensors")
    files.needs_torch = dtype is not None
    if target.suffix == ".safetensors":
        files.destination, files.outputs = OneFile(target), [safetensors_file(target.name, tensors, metadata)]
        return files
    files.outputs = [safetensors_file(_file_name(to, target), tensors, metadata)]
    if config:
        files.outputs.append(text_file("adapter_config.json", as_json(config)))
    return files


def _file_name(to: str, folder: Path) -> str:
    """Of an adapter in a folder. ComfyUI has all adapters in one folder, where those of two experts need two names."""
    expert = expert_of(folder)
    return FILES[to].replace(".", f"_{expert}_noise.") if expert and to == "comfyui" else FILES[to]


def _origin(checkpoint: Checkpoint) -> dict[str, str]:
    form = f"{checkpoint.layout}, {checkpoint.dialect} names"
    return {"source": str(checkpoint.path.resolve()), "source_form": form}


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    return checkpoint.metadata if checkpoint.layout in ("mm", "safetensors") else {"format": "pt"}


def _copies(folder: Path) -> list[Output]:
    """What stands beside the weights on the hub: configuration, tokenizer, licence."""
    weights = (*SUFFIXES, ".safetensors", ".msgpack", ".h5", ".onnx")
    skipped = (MANIFEST, TRACKER, "config.json")
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in weights and not path.name.startswith(".") and path.name not in skipped
    ]
    for file in files:
        refuse_link_out(file)
    return [copy_file(path) for path in files if not path.name.endswith(".index.json")]


def _config_like(path: Path, dtype: str | None) -> Output:
    """The published config.json; where the dtype changes, it says the new one, which transformers loads in."""
    if dtype is None:
        return text_file("config.json", read_bytes(path))
    return text_file("config.json", as_json(_replace_dtype(read_json(path), dtype)))


def config_of(folder: Path | None, family: Family, config: Config) -> dict[str, Any] | None:
    """The config.json in a published folder, if there is one and it is of this architecture."""
    path = None if folder is None else folder / "config.json"
    if path is None or not path.is_file():
        return None
    json_ = read_json(path)
    try:
        said = family.read_config(json_)
    except ValueError:
        return None
    return json_ if said and all(config.get(name, value) == value for name, value in said.items()) else None


def state_dtype(json_: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config.json that says the dtype of all its tensors, where they have one."""
    if dtype is None:
        return dict(json_)
    return _replace_dtype({"torch_dtype": dtype, **json_} if "dtype" not in json_ else dict(json_), dtype)


def _replace_dtype(json_: dict[str, Any], dtype: str) -> dict[str, Any]:
    for table in (json_, *(value for value in json_.values() if isinstance(value, dict))):
        table.update({key: dtype for key in ("dtype", "torch_dtype") if key in table})
    return json_


def _is_in_place(target: Path, checkpoint: Checkpoint, to: str) -> bool:
    """Whether converting in place: the source is to stay, and what is made of it to stand beside it.

    Raises ValueError for a target that would then hold two things to be opened, and for one that holds the source
    otherwise, as replacing it would lose what lies around it.
    """
    target, folder = target.resolve(), checkpoint.folder.resolve()
    path = checkpoint.path.resolve()
    same = target == path or (target == folder and path.is_dir())
    if not same and any(target == file.resolve() or target in file.resolve().parents for file in checkpoint.files):
        raise ValueError(f"{target} holds the source, {path}; name another target")
    published = checkpoint.layout in ("safetensors", "torch")
    other = {"mm": target / TRACKER, "mindspeed": target / FOLDER}.get(to)
    if same and (checkpoint.layout == "dcp" or (other and other.exists())):
        holds = checkpoint.layout if checkpoint.layout == "dcp" else other
        raise ValueError(f"{target} holds {holds}; with both it would not be clear which is meant: name another target")
    if same and to in ("mm", "mindspeed") and not (target == folder and checkpoint.layout == "mm"):
        return True
    if same and to != "dcp" and (not published or folder != target) and checkpoint.layout != "mm":
        return True
    if target in folder.parents:
        raise ValueError(f"{target} holds the source, {folder}; name another target")
    return False

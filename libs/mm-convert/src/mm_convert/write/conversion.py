"""From one checkpoint to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mm_convert.lora.adapter import Adapter
from mm_convert.lora.merging import merge
from mm_convert.read.checkpoint import Checkpoint, open_checkpoint
from mm_convert.store.mindspeed import TRACKER
from mm_convert.store.mm import FOLDER, MANIFEST, as_json, read_json
from mm_convert.store.safetensors import refuse_link_out
from mm_convert.store.torch_file import SUFFIXES
from mm_convert.tensors.stages import Layers
from mm_convert.tensors.views import LazyTensor
from mm_convert.write.destinations import OneFile
from mm_convert.write.outputs import Files, Output, copy_file, index_file, safetensors_file, text_file
from mm_convert.write.targets import Target, cast_all, prepare_target, split_of


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "mm",
    *,
    pp_layers: Layers | Mapping[str, Layers] = (),
    tp_size: int = 1,
    shard_bytes: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
    sha256: bool = False,
) -> Checkpoint:
    """Rewrite a checkpoint under the names and with the files of `to`; tensors keep their bytes, but for `dtype`.

    Args:
        source: anything that `open_checkpoint` reads.
        target: a folder that does not exist yet (with `overwrite`: or that holds nothing but a checkpoint); a name in
            .safetensors or .pt makes one file. The same as `source`: published files stay, and what is made of them
            goes into `mm/` or `release/` beside them.
        to: "mm" (our own layout), "mindspeed" (MindSpeed-MM's tree), "dcp" (torch DCP with MindSpeed-MM's names), or
            one of the family's dialects: "original", "diffusers", "transformers".
        pp_layers: layers of each pipeline stage, flat or one list per virtual stage; by ladder where there are several
            ({"llm": …, "vit": …}). In our own layout a stage is a file.
        tp_size: tensor-parallel ranks. In our own layout tensors stay whole, any rank reads its slice of them.
        shard_bytes: regroup into files of at most so many bytes; None keeps the grouping of the source.
        dtype: "float32", "bfloat16" or "float16" for all tensors of floating point (needs torch).
        sha256: note the sum of every written tensor in `mm_convert.json`.

    Returns the source as it was opened; its `notes` say what was dropped. Raises ValueError before anything is
    written.
    """
    checkpoint = open_checkpoint(source)
    files = prepare_conversion(
        checkpoint, target, to, pp_layers=pp_layers, tp_size=tp_size, shard_bytes=shard_bytes, dtype=dtype
    )
    files.write(overwrite=overwrite, show_progress=show_progress, sha256=sha256)
    return checkpoint


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
    tensors = checkpoint.tensors if dtype is None else cast_all(checkpoint.tensors, dtype)
    wanted = Target(
        target,
        to,
        split_of(content.family, pp_layers, tp_size),
        shards=list(checkpoint.shards.values()) if checkpoint.layout in ("mm", "safetensors") else None,
        shard_bytes=shard_bytes,
        in_place=_is_in_place(target, checkpoint, to),
        metadata=_metadata(checkpoint),
    )
    files = prepare_target(wanted, content, tensors, checkpoint.config, **_origin(checkpoint))
    files.needs_torch = dtype is not None or to == "dcp"
    files.notes = [*checkpoint.notes, *files.notes]
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
    pp_layers: Layers = (),
    dtype: str | None = None,
) -> Files:
    """What a base with the adapter at `where` in it would be, in the form `to`. Needs torch to be carried out."""
    import mm_convert.tensors.torch  # noqa: F401  # so that a missing torch is said before anything is written

    base.tensors = merge(base.tensors, adapter)
    files = prepare_conversion(base, target, to, pp_layers=pp_layers, dtype=dtype)
    files.needs_torch = True
    files.notes += [*adapter.notes, f"{len(adapter.modules)} weights are merged"]
    manifest = base.folder / MANIFEST
    before = read_json(manifest).get("merged", []) if manifest.exists() else []
    if before:
        files.notes.append(f"{base.path} has an adapter merged into it already: {before[-1]['source']}")
    files.manifests[""]["merged"] = [*before, {"source": str(where), "rank": adapter.rank, "alpha": adapter.alpha}]
    return files


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
        return text_file("config.json", path.read_bytes())
    config = read_json(path)
    for table in (config, *(value for value in config.values() if isinstance(value, dict))):
        table.update({key: dtype for key in ("dtype", "torch_dtype") if key in table})
    return text_file("config.json", as_json(config))


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

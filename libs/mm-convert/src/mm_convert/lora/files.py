"""Adapters (LoRA) on disk: opened from any layout, written in any format, merged into any base."""

from __future__ import annotations

from math import prod
from pathlib import Path

from mm_convert.lora import FILES, Adapter, is_lora, lora_tensors, merge, read_lora
from mm_convert.read.checkpoint import Checkpoint
from mm_convert.read.source import Source, find
from mm_convert.store.mindspeed import rank_files
from mm_convert.store.mm import MANIFEST, as_json, read_json
from mm_convert.store.torch_file import SUFFIXES
from mm_convert.tensors.stages import Layers, Split
from mm_convert.write.conversion import cast_all, prepare_conversion
from mm_convert.write.destinations import Folder, OneFile
from mm_convert.write.outputs import Files, describe, safetensors_file, text_file
from mm_convert.write.targets import release


def open_adapter(path: str | Path, *, alpha: float | None = None, rank: int | None = None) -> Adapter | None:
    """The adapter at a path, in whatever layout and format; None where a whole model is. Errors as `read_lora`."""
    source = find(Path(path))
    if not is_lora(source.tensors):
        return None
    if source.layout == "dcp" and alpha is None:
        raise ValueError(f"{path} is a training checkpoint, which does not say alpha: give --lora_alpha, or export it")
    beside = source.folder / "adapter_config.json"
    # Of a file under another name, the config beside it may be somebody else's.
    known = beside.exists() and source.files[0].name == FILES["peft"]
    metadata = source.metadata | _manifest_metadata(source)
    return read_lora(source.tensors, metadata, read_json(beside) if known else None, str(path), alpha, rank)


def _manifest_metadata(source: Source) -> dict[str, str]:
    """Rank and alpha, which MindSpeed-MM's tree has no place for."""
    for folder in (source.folder, source.folder.parent) if source.layout == "mindspeed" else ():
        if (folder / MANIFEST).exists():
            return dict(read_json(folder / MANIFEST).get("metadata", {}))
    return {}


def prepare_adapter(
    adapter: Adapter, source: str | Path, target: str | Path, to: str, dtype: str | None = None
) -> Files:
    """What writing an adapter in a format would write: a folder, or one file for a target in .safetensors."""
    target = Path(target)
    here, there = Path(source).resolve(), target.resolve()
    if here == there or there in here.parents or here in there.parents:
        raise ValueError(f"{target} is the adapter itself, or holds it, or lies in it; name another target")
    tensors, metadata, config = lora_tensors(adapter, to)
    if dtype is not None:  # of the factors; alpha is no weight
        tensors |= cast_all({name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}, dtype)
    more = {"metadata": metadata} if to == "mindspeed" else {}
    family = adapter.family
    about = describe(str(Path(source).resolve()), family.name, {}, f"LoRA, {adapter.format}", f"LoRA, {to}", **more)
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
    files.outputs = [safetensors_file(FILES[to], tensors, metadata)]
    if config:
        files.outputs.append(text_file("adapter_config.json", as_json(config)))
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
    import mm_convert.tensors.torch  # noqa: F401  # so that a missing torch is said before anything is planned

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


def inspect_adapter(path: str | Path) -> str | None:
    """What an adapter is, for people; None where a whole model is."""
    source = find(Path(path))
    if not is_lora(source.tensors):
        return None
    rows = {"what": "LoRA adapter"}
    try:
        adapter = open_adapter(path)
    except ValueError as error:
        rows["problem"] = str(error)
        adapter = None
    if adapter:
        strengths = {(module.rank, module.alpha) for module in adapter.modules.values()}
        rows |= {
            "family": adapter.family.name,
            "format": f"{adapter.format}, {adapter.dialect} names",
            "layout": source.layout,
            "modules": f"{len(adapter.modules)}",
            "rank, alpha": "; ".join(f"{rank}, {alpha:g}" for rank, alpha in sorted(strengths)),
            "parameters": f"{sum(prod(t.shape) for m in adapter.modules.values() for t in (m.a, m.b)):,}",
            "base": adapter.base or "not said",
        }
    lines = [f"{key:<14} {value}" for key, value in rows.items()]
    return "\n".join([str(path), *lines, *(f"note: {note}" for note in (adapter.notes if adapter else ()))])

"""Opening a checkpoint, whatever its files and names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from mm_convert.families import FAMILIES, Family
from mm_convert.families.family import Config
from mm_convert.families.presets import name_preset
from mm_convert.files import brief, read_json
from mm_convert.lora.names import is_lora
from mm_convert.read.content import Content, cut_fused, identify, recognise
from mm_convert.read.kinds import refuse_quantised
from mm_convert.read.source import Source, find
from mm_convert.store import mindspeed
from mm_convert.store.mm import FORMAT, MANIFEST, VERSION
from mm_convert.tensors.mapping import Tensors
from mm_convert.tensors.views import LazyTensor, Stored


class Checkpoint(Tensors):
    """A checkpoint on disk as a mapping of *our* names to tensors; only headers are read until a tensor is asked for.

    Attributes:
        path: the folder or file it was opened as.
        layout: "mm" (ours), "safetensors", "torch" (.pt, .pth), "gguf", "mindspeed" (a tree of ranks) or "dcp".
        dialect: the names on disk, for example "original", "diffusers" or "mindspeed".
        family: for example "wan".
        config: the fields of the model's configuration, for example of `WanConfig`. A number of heads is absent where
            neither a config.json nor the published sizes say it.
        said: what a config.json says of these fields, as it stands there: it may be wrong. `said_in` is that file.
        quantised: how the files hold weights that are read as bfloat16 here, for example "fp8 scaled (e4m3fn)"; "" for
            files without such.
        described: of a single file, or of quantised weights, what they were recognised as, for people; else "".
        notes: what a person should know: tensors that were dropped, a config.json that contradicts the tensors.
        tensors: our name -> where its bytes are, in the order of the files.
        metadata: the free text of the safetensors headers.
        split: of a MindSpeed-MM tree, its ranks and layers per stage.
        shards: our names by the file that holds them, where every tensor lies whole in one.
    """

    def __init__(
        self,
        path: Path,
        source: Source,
        layout: str,
        content: Content,
        tensors: dict[str, LazyTensor],
        config: Config,
        said: Config,
        said_in: Path,
        notes: list[str],
        described: str = "",
    ) -> None:
        super().__init__(tensors)
        self.path, self.layout, self.content = path, layout, content
        self.files, self.folder, self.metadata, self.split = source.files, source.folder, source.metadata, source.split
        self.config, self.said, self.said_in, self.notes = config, said, said_in, notes
        self.dialect, self.family = content.dialect, content.family.name
        self.quantised, self.described = ", ".join(source.kinds), described
        self.shards = _by_file(tensors)


def _by_file(tensors: Mapping[str, LazyTensor]) -> dict[Path, list[str]]:
    shards: dict[Path, list[str]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Stored):
            return {}
        shards.setdefault(tensor.file, []).append(name)
    return shards


def open_checkpoint(
    path: str | Path,
    *,
    config: Config | None = None,
    published: bool = False,
    part: str = "model",
    prefix: str = "",
) -> Checkpoint:
    """Open a checkpoint of any layout and dialect that is known.

    Args:
        path: a diffusers or transformers repository, its transformer folder, a Wan-AI folder, our own folder, one
            .safetensors or torch file, a MindSpeed-MM tree, a torch DCP folder or a run of mm_train.
        config: what is known of the configuration, for files that do not say it themselves.
        published: in a folder that was converted in place, open the published files, not what was made of them.
        part: "model"; or "ema" of a training checkpoint.
        prefix: what the names of the model begin with, where they begin with something unusual.

    Raises ValueError when it is none of these, when a file is broken, or when a tensor is unknown, missing or
    misshapen.
    """
    path = Path(path)
    source = find(path, published, part, prefix)
    if is_lora(source.tensors):
        raise ValueError(
            f"{path} holds a LoRA adapter, not a whole model: name its base here, and the adapter as one (mm_infer "
            f"--lora, mm_train --lora.weights); `mm-convert convert BASE TARGET --lora {path}` makes one model of both"
        )
    refuse_quantised(source.tensors, str(path))
    family, dialect = recognise(source.tensors, str(path))
    said, is_ours, where = read_config(source, family)
    said = {**(config or {}), **said}
    tensors, copies = _drop_copies(source.tensors, family, dialect, said, str(path))
    tensors = cut_fused(tensors, family, dialect, said, str(path))
    try:
        content = identify({name: tensor.shape for name, tensor in tensors.items()}, str(path))
    except ValueError as error:
        raise ValueError(f"{error}{_way_to_the_rest(source)}") from error
    ours = {content.names[name]: tensor for name, tensor in tensors.items() if name in content.names}
    notes = [*source.notes, *copies]
    # The shapes say most fields and are always right; config.json adds what they cannot say (num_heads, eps).
    complete, doubts = family.complete({**said, **content.config})
    described = _describe(source, content, ours, complete) if path.is_file() or source.kinds else ""
    notes += [described] if described else []
    wrong = {f: v for f, v in content.config.items() if f in said and said[f] != v}
    if wrong:
        differences = ", ".join(f"{field} {brief(said[field])} instead of {value}" for field, value in wrong.items())
        notes.append(f"{where} says {differences}: the tensors are believed")
    for reason in sorted(set(content.ignored.values())):
        names = [name for name, why in content.ignored.items() if why == reason]
        notes.append(f"{len(names)} tensors are left out ({reason}): {names[0]}" + (", …" if len(names) > 1 else ""))
    layout = "mm" if is_ours and source.layout == "safetensors" else source.layout
    return Checkpoint(path, source, layout, content, ours, complete, said, where, notes + doubts, described)


def _describe(source: Source, content: Content, tensors: Mapping[str, LazyTensor], config: Config) -> str:
    """What kind of file this is, in what its numbers are, how many tensors there are, and which model it is."""
    comfyui = source.layout == "safetensors" and len(source.files) == 1 and content.dialect == content.family.comfyui
    what = {"gguf": "GGUF file"}.get(source.layout, "ComfyUI single file" if comfyui else f"{source.layout} file")
    dtypes = Counter(tensor.dtype.lower() for tensor in tensors.values()).most_common()
    held = ", ".join(f"{kind} ({count:,})" for kind, count in source.kinds.most_common())
    held = f"{held}, read as bf16" if held else " and ".join(dtype for dtype, _ in dtypes)
    preset = name_preset(content.family, content.config | config)
    return f"{what}, {held}, {len(tensors):,} tensors" + ("" if preset.startswith("none") else f": {preset}")


def _way_to_the_rest(source: Source) -> str:
    """Where the frozen tensors are, of a run of mm_train that trains a part."""
    if source.layout != "dcp" or not (source.folder / "progress.json").exists():
        return ""
    return (
        f". Checkpoints of mm_train hold only what is trained; whole weights are in weights/ of a run that "
        f"has ended, and in W after `python -m mm_train.export {source.folder} --output W`"
    )


def read_said(folder: Path, family: str) -> Config:
    """The fields of our configuration that a published folder's config.json says; none where it is not of this family.

    For `open_checkpoint(…, config=…)`, where that folder has only the tokenizer of the weights that are opened.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        return next(f for f in FAMILIES if f.name == family).read_config(read_json(path))
    except ValueError:
        return {}


def read_config(source: Source, family: Family) -> tuple[Config, bool, Path]:
    """What the files beside the tensors say of the configuration; whether they are ours; and where it stands."""
    candidates = [source.folder / "config.json", source.folder / MANIFEST]
    if source.layout == "mindspeed" and (source.folder.parent / mindspeed.TRACKER).exists():
        # Ours beside the tracker; converted in place, the published config.json beside the tree.
        candidates += [source.folder.parent / MANIFEST, source.folder.parent / "config.json"]
    if len(source.files) == 1:
        candidates.insert(0, source.files[0].with_name(f"{source.files[0].name}.{MANIFEST}"))
    for path in (path for path in candidates if path.exists()):
        json_ = read_json(path)
        if path.name.endswith(MANIFEST):
            if json_.get("family") == family.name and isinstance(json_.get("config"), dict):
                return json_["config"], False, path
        elif json_.get("format") == FORMAT:
            if json_.get("version") != VERSION:
                raise ValueError(f"{path} has version {json_.get('version')!r}; this mm_convert reads {VERSION}")
            if not isinstance(json_.get("config"), dict):
                raise ValueError(f"{path} has no table config")
            return json_["config"], True, path
        else:
            try:
                return family.read_config(json_), False, path
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    return {}, False, source.folder


def _drop_copies(
    tensors: dict[str, LazyTensor], family: Family, dialect: str, said: Config, where: str
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Without second names of tensors, compared byte by byte; and notes.

    Some files repeat tied embeddings, MindSpeed-MM's on the last stage: what is repeated is no tensor of the model.
    Raises ValueError where one that should be a copy is none.
    """
    notes = []
    for copy, original in family.copies.get(dialect, {}).items():  # there is no such tensor in the model
        if copy in tensors and original not in tensors:
            tensors = {original if name == copy else name: tensor for name, tensor in tensors.items()}
        elif copy in tensors and not _equal(tensors[original], tensors[copy]):
            raise ValueError(
                f"{where}: {copy} differs from {original}, whose second name it is: which is right cannot be known. "
                "Save the model anew from the program that has loaded it rightly"
            )
    tied = [next(row.names[dialect] for row in family.table.rows if row.name == name) for name in family.tied]
    if tied and set(tied) <= set(tensors) and said.get("tied") is not False:
        if _equal(tensors[tied[0]], tensors[tied[1]]):
            tensors = {name: tensor for name, tensor in tensors.items() if name != tied[1]}
            notes.append(f"{tied[1]} is the same as {tied[0]}: they stay tied")
        elif said.get("tied"):
            raise ValueError(
                f"{where}: {tied[1]} differs from {tied[0]}, though the configuration says that they are tied: which "
                "is right cannot be known. If both are meant, write false for tie_word_embeddings into config.json"
            )
    return tensors, notes


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = max(1, 2**23 // max(1, a.row_bytes))  # rows in 8 MiB
    ends = ((top, min(top + step, a.height)) for top in range(0, a.height, step))
    return all(a.read(*rows) == b.read(*rows) for rows in ends)

"""What a model begins with: which of its parameters are trained, where the value of each comes from, how it is cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mm_convert import Adapter, Checkpoint, expert_of, open_checkpoint, open_experts, read_said
from mm_convert.cli.values import check_fields
from mm_convert.lora.base import check_base, describe_content
from mm_models import build, plan
from mm_models.families import family_of
from mm_models.family import Family
from mm_models.initial import initial_adapter
from mm_models.layers import cast_weights
from mm_models.lora import LoRAConfig, add_lora
from mm_models.parts import find_parameters
from mm_parallel import Pipeline, load_parameters, parallelize, verify
from mm_parallel.attention import activate, describe_choice
from mm_parallel.config import ParallelConfig
from mm_parallel.fits import check_fits, find_idle
from mm_parallel.frozen import frozen_linears
from mm_parallel.mesh import size
from mm_parallel.weights import allocate, check_names, check_shape, same_kind
from mm_train.adapter import check_targets, describe_base, open_adapter
from mm_train.checks.paths import check_space
from mm_train.config import Config
from mm_train.optim import find_matrices
from mm_train.parts import find_rates, tabulate


def freeze(model: nn.Module, trained: Sequence[str], dtype: torch.dtype) -> None:
    """Leaves only the parameters that a part or a pattern names to be trained; the others need no float32 masters.

    ValueError for one that names none.
    """
    chosen = {name for wanted in trained for name in find_parameters(model, wanted, "--trained")}
    wide = {name: p.dtype for name, p in model.named_parameters()}
    cast_weights(model, dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in chosen
        if parameter.requires_grad:
            parameter.data = parameter.data.to(wide[name])


class Start(Mapping[str, Tensor]):
    """Every parameter by name, read or drawn when it is asked for.

    Adapter matrices are fresh, or those of an adapter to go on from; the layers they wrap keep their published name in
    the file. What the file lacks may grow from what it has, if the model's family knows how (`Family.start`).
    """

    def __init__(self, model: nn.Module, config: Config, adapter: Adapter | None = None):
        path, seed = config.weights, config.seed
        self.path, self.seed, self.config = path, seed, model.config
        self.family = family_of(model.config).start()
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.file = None if path == "random" else open_base(config, model.config)
        self.adapters = {name for name in self.shapes if ".lora_" in name}
        self.adapter = adapter
        self.published = {name.replace(".base_layer.", "."): name for name in self.shapes if name not in self.adapters}
        self.other_base: list[str] = []
        """Where the adapter was trained on other weights, a line that says so."""
        if adapter is not None:
            fit_adapter(adapter, model)
            now = describe_base(config) | describe_content(self.file.tensors, adapter.modules)
            self.other_base = check_base(adapter.trained_on, now, f"--lora.weights {config.lora.weights}")
        there = list(self.file or self.published)
        self.grown = self.family.missing(self.published, there)
        self.names = [*self.adapters, *(self.published.get(n, n) for n in (*there, *self.grown))]

    def check_fit(self, model: nn.Module) -> None:
        """Raise ValueError unless the files hold what the model needs: every name and shape, and numbers of its kind.
        Of files, only the headers are read.
        """
        try:
            wanted = model.state_dict()
            check_names(set(wanted), set(self))
            for name, target in wanted.items():
                published = name.replace(".base_layer.", ".")
                if self.file is not None and published in self.file:
                    given = self.file.meta(published)
                    check_shape(published, given, target)
                    same_kind(published, given, target)
        except ValueError as error:
            raise ValueError(f"--weights {self.path}: {error}") from error

    def check_open(self, model: nn.Module) -> None:
        """Raise ValueError if a projection that begins at zero stays frozen: nothing could learn through it."""
        fresh = self.published if self.file is None else self.grown
        zero = {name for name in fresh if any(fnmatch(name, pattern) for pattern in self.family.ZERO)}
        frozen = {name.replace(".base_layer.", ".") for name, p in model.named_parameters() if not p.requires_grad}
        if shut := sorted(zero & frozen):
            why = self.family.GROWN.partition(":")[0] if self.file else "a fresh model"
            raise ValueError(
                f"{shut[0]} of {why} begins at zero and would stay so, as it is not trained: nothing could be learned "
                "through it. Train it first (--trained), or give --weights in which it has learned"
            )

    def describe(self) -> str:
        """What a person should know: of values that were not in the file, and of what it was trained for that this run
        is not; empty where there is nothing.
        """
        grown = f" ({self.family.GROWN})" if self.grown else ""
        changed = [] if self.file is None else _find_changes(self.file, self.config, family_of(self.config).unseen)
        before = f" (trained with {', '.join(changed)})" if changed else ""
        facts = [] if self.adapter is None else [f"of {self.adapter.format}", f"alpha {self.adapter.alpha:g}"]
        adapter = f" (adapters {', '.join((*facts, *self.other_base))})" if facts else ""
        return self._describe_file() + grown + before + adapter

    def _describe_file(self) -> str:
        """What a single file was recognised as; of quantised weights, what that means for training them."""
        if self.file is None or not self.file.described:
            return ""
        rounded = self.file.quantised and not self.adapters
        trained = "; trained are the rounded weights, not those that they were made of" if rounded else ""
        return f" ({self.file.described}{trained})"

    def __getitem__(self, name: str) -> Tensor:
        if name in self.adapters and self.adapter is not None:
            return self.adapter[name.replace(".default.", ".")]
        if name in self.adapters:
            return initial_adapter(name, self.shapes[name], self.seed)
        published = name.replace(".base_layer.", ".")
        if published in self.grown:
            return self.family.grow(self.config, self._base, published, self.shapes[name])
        return self._base(published)

    def _base(self, published: str) -> Tensor:
        if self.file is None:
            return self.family.initial(published, self.shapes[self.published[published]], self.seed)
        return self.file[published]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def fit_adapter(adapter: Adapter, model: nn.Module) -> None:
    """Raise ValueError unless an adapter to go on from stands beside exactly the linears that are trained."""
    shapes = {name.replace(".base_layer.", "."): tuple(p.shape) for name, p in model.named_parameters()}
    weights = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if ".lora_" not in name}
    check_targets(adapter, weights, {name.partition(".lora_")[0] for name in shapes if ".lora_" in name})


class Built(NamedTuple):
    """A model that is cut over the ranks."""

    parameters: nn.Module
    """Holds this rank's parameters."""
    model: nn.Module | Pipeline
    """Is called: the same, or the pipeline that it is a part of."""
    size: int
    """Parameters of the whole model."""
    trained: int
    rates: Mapping[str, float]
    """Of parameters that have a learning rate of their own, by name; of the whole model."""
    matrices: frozenset[str]
    """Names of the trained matrices in layers, of the whole model."""
    parts: list[str]
    """A table of the parts: how many parameters each has, how many of them are trained, and at which rate."""
    notes: str = ""
    """What a person should know of the values it begins with."""


def outline(config: Config) -> nn.Module:
    """The whole model of a run without values, on the meta device: with its adapters, and knowing what is trained."""
    dtype = getattr(torch, config.dtype)
    model = build(config.model, device="meta", **config.architecture)
    model.compute_dtype = dtype
    if config.lora.rank:
        cast_weights(model, dtype)  # a frozen base needs no float32 masters
        add_lora(model, LoRAConfig(config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets))
    elif config.has_frozen:
        freeze(model, config.trained, dtype)
    return model


def choose_attention(config: Config, mesh: DeviceMesh | None, device: torch.device) -> str:
    """Makes torch ready for the kernel of attention, and says in a few words which it is.

    ValueError for one that cannot run here.
    """
    if config.parallel.exact:
        if config.attention != "auto":
            raise ValueError(f"attention {config.attention}: parallel.exact has an order of its own; leave one out")
        return "head by head in one fixed order, for exact sums"
    activate(config.attention, device.type)
    dtype = getattr(torch, config.dtype)
    return describe_choice(config.attention, plan(outline(config)), device, dtype, mesh)


def build_model(config: Config, mesh: DeviceMesh | None, device: torch.device, continuing: bool) -> Built:
    """The model of a run.

    It is cut over the mesh and filled tensor by tensor; no rank ever holds all of it. Continuing, it is left empty, for
    the checkpoint to fill; but the base below an adapter is read again.
    """
    dtype = getattr(torch, config.dtype)
    model = outline(config)
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad or frozen) for frozen in (True, False)]
    check_space(sizes[1], config)
    rates = find_rates(model, config.optim)
    facts = (*sizes, rates, find_matrices(model, plan(model)), tabulate(model, rates, config))
    source = None
    if config.has_frozen or not continuing:
        adapter = open_adapter(config) if config.lora.weights and not continuing else None
        source = Start(model, config, adapter)
        source.check_fit(model)
        source.check_open(model)
    run = _cut(model, config, mesh, dtype)
    if source is None:
        allocate(model, device, config.memory.offload_params)
        return Built(model.train(), run, *facts)
    elsewhere = () if run is model else run.elsewhere
    load_parameters(model, source, device, elsewhere, config.memory.offload_params)
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not torch.isfinite(local).all():
            raise ValueError(f"--weights {config.weights}: {name} holds numbers that are not finite")
    for name, linear in frozen_linears(model).items():
        if not linear.is_finite():
            raise ValueError(f"--weights {config.weights}: {name} holds numbers that are not finite")
    return Built(model.train(), run, *facts, source.describe())


def _cut(model: nn.Module, config: Config, mesh: DeviceMesh | None, dtype: torch.dtype) -> nn.Module | Pipeline:
    """Cuts the model in place over the mesh; returns what is called."""
    if config.parallel.exact:
        return verify.parallelize(model, plan(model), mesh, config.memory)
    how = (plan(model), mesh, config.parallel, config.memory, dtype, config.attention, config.compile)
    return Pipeline(model, *how) if size(mesh, "pp") > 1 else parallelize(model, *how)


def check_cut(model: nn.Module, config: Config, world: int) -> None:
    """Raise ValueError where the whole model cannot be laid out on so many ranks, and as `check_stages_train`."""
    layout = config.parallel.resolve(world)
    if config.parallel.exact:
        return  # `resolve` has checked all of it
    check_fits(model, plan(model), layout, config.memory)
    check_stages_train(model, config, layout)


def check_stages_train(model: nn.Module, config: Config, layout: ParallelConfig) -> None:
    """Raise ValueError for a pipeline stage of which nothing is trained. layout: resolved."""
    if idle := find_idle(model, plan(model), layout, config.memory):
        raise ValueError(
            f"pipeline stages {idle} would hold nothing that is trained: choose other --parallel.pp_layers, or train "
            "something in every stage (--lora.targets, --trained)"
        )


def open_base(config: Config, wanted: Any) -> Checkpoint:
    """The files of --weights, if what they say of the model is what is wanted; not all of it shows in names and shapes.

    wanted: the model's configuration. ValueError for those of another model.
    """
    path = Path(config.weights)
    if (path / "checkpoints").is_dir() and (path / "metrics.jsonl").is_file():
        raise ValueError(f"--weights {path} is a run: its weights are in {path / 'weights'} when it has finished")
    expert, of_folder = config.expert, expert_of(path)
    if expert and of_folder and of_folder != expert:
        raise ValueError(
            f"--weights {path} is the expert for {of_folder} noise, and --expert is {expert}: give the other"
        )
    if expert and (pair := open_experts(path)):
        path = pair.high if expert == "high" else pair.low
    family = family_of(wanted)
    # A tree of MindSpeed-MM says less than the folder of the hub that its tokenizer is from.
    file = open_checkpoint(path, config=_read_beside(config, family))
    if file.family not in family.checkpoints:
        raise ValueError(f"--weights {path} holds {file.family}, and the model asked for is of {family.name}")
    check_fields(type(wanted), {n: v for n, v in file.said.items() if v is not None}, f"{file.said_in}: ")
    tensors = [name for name in file.config if name not in family.unseen]
    if other := _find_changes(file, wanted, tensors):
        raise ValueError(
            f"--weights {path} is another architecture: {', '.join(other)}. Give --architecture with what the weights "
            "have, another --model, or other weights"
        )
    return file


def _read_beside(config: Config, family: Family) -> dict[str, Any]:
    """What the config.json of the processor's folder says of the model."""
    folder = config.data.processor
    return {} if folder is None else {k: v for name in family.checkpoints for k, v in read_said(folder, name).items()}


def _find_changes(file: Checkpoint, wanted: Any, names: Iterable[str]) -> list[str]:
    """Of these fields, those that the files say differently, in words."""
    said = {name: file.config[name] for name in names if name in file.config}
    said = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    return [f"{k} {v} (asked for: {getattr(wanted, k)})" for k, v in said.items() if v != getattr(wanted, k, v)]

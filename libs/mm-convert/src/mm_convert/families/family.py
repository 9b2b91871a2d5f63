"""What a family has to say of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm_convert.tensors.fusion import Fusion
    from mm_convert.tensors.rules import Table

Config = dict[str, Any]


@dataclass(frozen=True)
class Ladder:
    """How pipeline stages cut one ladder of a family, in MindSpeed-MM's names.

    `layer` is what comes before the layer number. A tensor outside of the layers lives on the last stage that has a
    layer of this ladder if its name starts with one of `last`, on the first such stage if with one of `first`.
    """

    name: str
    layer: str
    first: tuple[str, ...]
    last: tuple[str, ...] = ()
    letter: str = "i"  # of the layers in the table
    follows: str = ""  # field of the configuration: for each layer, the layer of the first ladder whose stage it shares


@dataclass(frozen=True)
class Cuts:
    """How MindSpeed-MM splits a model over ranks; patterns of fnmatch for its names.

    Tensor parallelism cuts tensors into equal slices of rows or of columns; of `halves` each half of the rows is cut,
    and a rank has a slice of both. `divides`: what tp must divide, in words and as a field of the configuration.
    """

    ladders: tuple[Ladder, ...]
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    halves: tuple[str, ...] = ()
    divides: Mapping[str, str] = field(default_factory=dict)
    tied: tuple[str, str] | None = None  # with several stages, the first is repeated as the second on the last stage
    version: bool = False  # whether files say checkpoint_version 3.0 even without virtual stages


@dataclass(frozen=True)
class Family:
    """A family of models: its tensors, and its config.json in every dialect. The first dialect of the table is ours.

    `from_sizes(sizes, groups, layers)` gives the fields of our configuration that the shapes say; `layers` counts the
    layers of each letter.
    `read_config(json)` gives our fields from a published config.json of any dialect, only those that stand in it.
    `write_config[dialect](config)` gives the published config.json for our fields.
    `complete(config)` adds what follows from the other fields and takes out what cannot be; with notes on both.
    `presets` are the configurations of published weights, only the fields that set them apart.
    `boundaries`: of presets that are two experts, the noise level from which on the high-noise one generates.
    `fusions[dialect]`: the names of that dialect which hold several tensors of ours.
    `tied`: our names of two tensors that are one in some models, the second being left out.
    `copies[dialect]`: what some files hold besides, a second name of a tensor -> its first one.
    `in_memory`: the dialect of models in memory, beside which peft puts its adapters, where it is not ours.
    `comfyui`: the dialect of ComfyUI's single files; "" where there are none.
    `mindspeed_file`: what MindSpeed-MM calls it, where it has no tree of it but one file.
    `heads(shapes, config)`: the counts that cutting them needs, from the shapes in that dialect and what is known of
    the configuration.
    """

    name: str
    table: Table
    from_sizes: Callable[[Mapping[str, int], set[str], Mapping[str, int]], Config]
    read_config: Callable[[Mapping[str, Any]], Config]
    write_config: Mapping[str, Callable[[Config], Config]]
    complete: Callable[[Config], tuple[Config, list[str]]]
    presets: Mapping[str, Config] = field(default_factory=dict)
    boundaries: Mapping[str, float] = field(default_factory=dict)
    fusions: Mapping[str, tuple[Fusion, ...]] = field(default_factory=dict)
    heads: Callable[[Mapping[str, tuple[int, ...]], Config], Config] | None = None
    cuts: Cuts | None = None
    tied: tuple[str, ...] = ()
    copies: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    in_memory: str = ""
    comfyui: str = ""
    mindspeed_file: str = ""

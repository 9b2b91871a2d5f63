"""VACE: a Wan with a second ladder of control blocks {j}, whose outputs are added to some of its layers.

All of Wan's rows stand here again; a control block is a Wan block and a projection behind it, the first also has one
before it. MindSpeed-MM keeps the two ladders apart, as `wan_dit` and `vace_dit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_convert.families import wan
from mm_convert.families.family import Config, Cuts, Family, Ladder
from mm_convert.tensors.rules import Row, Table


def _in_wan_dit(row: Row) -> Row:
    return Row({**row.names, "mindspeed": f"wan_dit.{row.names['mindspeed']}"}, row.shape, row.group)


def _in_control_block(row: Row) -> Row:
    blocks = dict.fromkeys(row.names, "vace_blocks.{j}.") | {"mindspeed": "vace_dit.vace_blocks.{j}.wan_dit_block."}
    names = {dialect: blocks[dialect] + name.removeprefix("blocks.{i}.") for dialect, name in row.names.items()}
    return Row(names, row.shape, row.group)


def _affine(original: str, diffusers: str, shape: str) -> list[Row]:
    return wan.affine(original, diffusers, shape, mindspeed=f"vace_dit.{original}")


TABLE = Table(
    rows=[
        *(_in_wan_dit(row) for row in wan.TABLE.rows),
        # control ladder
        *_affine("vace_patch_embedding", "vace_patch_embedding", "dim control_channels patch_t patch_h patch_w"),
        *_affine("vace_blocks.0.before_proj", "vace_blocks.0.proj_in", "dim dim"),
        *(_in_control_block(row) for row in wan.TABLE.rows if row.letter == "i"),
        *_affine("vace_blocks.{j}.after_proj", "vace_blocks.{j}.proj_out", "dim dim"),
    ],
    ignored=wan.TABLE.ignored,
)


def from_sizes(sizes: Mapping[str, int], groups: set[str], layers: Mapping[str, int]) -> Config:
    """As of Wan, and for `complete` the number of control blocks; where they sit is not in the tensors."""
    config = wan.from_sizes(sizes, groups, layers)
    return config | {"control_channels": sizes["control_channels"], "vace_blocks": layers["j"]}


def complete(config: Config) -> tuple[Config, list[str]]:
    config, notes = wan.complete(config)
    said, depth = config.pop("vace_layers", None), config["num_layers"]
    count = config.pop("vace_blocks", None) or len(said)
    if count > depth:
        raise ValueError(f"{count} control blocks (vace_blocks) cannot sit at {depth} layers: at most one at each")
    config["vace_layers"] = [depth // count * j for j in range(count)]
    if said is None:
        notes.append(f"vace_layers are {config['vace_layers']} if control is spread evenly, as in every published VACE")
    elif _are_layers(said, depth) and len(said) == count:
        config["vace_layers"] = list(said)
    else:
        notes.append(
            f"vace_layers are said to be {said!r}, which cannot be the places of {count} control blocks "
            f"at {depth} layers: {config['vace_layers']} are taken"
        )
    return config, notes


def _are_layers(said: Any, depth: int) -> bool:
    """Whether these are numbers of layers, each larger than the one before; the first layer is always one."""
    if not isinstance(said, list | tuple) or not said or not all(type(layer) is int for layer in said):
        return False
    return sorted(set(said)) == list(said) and said[0] == 0 and said[-1] < depth


# --- config.json, as it is published


def read_config(json: Mapping[str, Any]) -> Config:
    """Our fields from a published config.json of either spelling, only those that stand in it."""
    spellings = {
        "vace_layers": "vace_layers",
        "vace_in_channels": "control_channels",
        "vace_in_dim": "control_channels",
    }
    found = {ours: json[theirs] for theirs, ours in spellings.items() if json.get(theirs) is not None}
    return wan.read_config(json) | found


def _write_diffusers(config: Config) -> Config:
    control = {"vace_layers": config["vace_layers"], "vace_in_channels": config["control_channels"]}
    return wan.write_diffusers(config) | control | {"_class_name": "WanVACETransformer3DModel"}


def _write_original(config: Config) -> Config:
    control = {"vace_layers": config["vace_layers"], "vace_in_dim": config["control_channels"]}
    return wan.write_original(config) | control | {"_class_name": "VaceWanModel", "model_type": "vace"}


# --- how training splits it, and what is published

CUTS = Cuts(
    ladders=(
        Ladder("layers", layer="wan_dit.blocks.", first=("wan_dit.", "vace_dit."), last=("wan_dit.head.",)),
        Ladder("vace", layer="vace_dit.vace_blocks.", first=(), letter="j", follows="vace_layers"),
    ),
    rows=wan.TP_ROWS,
    columns=wan.TP_COLUMNS,
    divides=wan.DIVIDES,
)

_SMALL = wan.SMALL | {"image_dim": None, "control_channels": 96, "vace_layers": list(range(0, 30, 2))}
_LARGE = wan.LARGE | {"image_dim": None, "control_channels": 96, "vace_layers": list(range(0, 40, 5))}

VACE = Family(
    name="vace",
    table=TABLE,
    from_sizes=from_sizes,
    read_config=read_config,
    write_config={"original": _write_original, "diffusers": _write_diffusers},
    complete=complete,
    comfyui="original",
    presets={"vace-1.3b": _SMALL, "vace-14b": _LARGE, "vace-a14b": _LARGE},  # a14b: each of its two experts
    boundaries={"vace-a14b": 0.875},
    cuts=CUTS,
)

"""The estimate as a person reads it: every number in the column that says how it is known."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple

from mm_convert import replace_file
from mm_convert.cli.terminal import one_line
from mm_parallel.devices import Device, find_device
from mm_parallel.estimate import RankMemory
from mm_parallel.estimate.roofline import StepTime
from mm_train.config import Config
from mm_train.estimate.config import EstimateConfig
from mm_train.estimate.estimate import Estimate, Subject
from mm_train.estimate.layouts import MEMORIES, command, describe, with_memory
from mm_train.estimate.search import Option, search
from mm_train.estimate.workload import find_samples

Known = Literal["counted", "modelled", "constant"]
"""counted: by running the code without values. modelled: by a formula. constant: of a device, from a table."""
COLUMNS: tuple[Known, ...] = ("counted", "modelled", "constant")
WORDS = {"saved": "saved activations", "gathered": "gathered weights"}
"""Parts of a rank's memory, where their names alone do not say what they are."""


class Row(NamedTuple):
    """A number, what it is, and how it is known."""

    name: str
    value: str
    known: Known
    note: str = ""


def report(config: EstimateConfig, world: int, argv: Sequence[str]) -> Iterator[str]:
    """All that there is to say, line by line. ValueError for what such a run would be refused for, paths aside."""
    device = find_device(config.device, config.devices) if config.device else None
    subject = Subject(config, find_samples(config, config.size))
    if config.search:
        if device is None:
            raise ValueError("--search ranks by seconds: give --device, e.g. h100")
        yield from _search(subject, config, world, device, argv)
        return
    found = subject.estimate(config, world, device)
    if config.json is not None:
        replace_file(config.json, json.dumps(to_json(found), indent=2) + "\n")
    yield from map(one_line, _lines(found, config, device))
    if device is not None and not found.fits(device):
        yield from _help(subject, config, world, device)


def _lines(found: Estimate, config: Config, device: Device | None) -> Iterator[str]:
    trained = "" if found.trained == found.parameters else f", {found.trained:,} trained"
    yield f"model      {found.model}: {found.parameters:,} parameters{trained}, matrices in {config.dtype}"
    yield f"task       {found.task}"
    yield f"samples    {found.samples}"
    yield f"ranks      {found.world:,}{f' of {device.name}' if device else ''}: {describe(config, found.layout)}"
    each = f"{found.micro_batches} micro-batch{'es' * (found.micro_batches > 1)} a rank"
    yield f"step       {config.data.global_batch:,} samples, {each}, {found.tokens:,.0f} tokens"
    yield ""
    rank = found.fullest
    where = f"of rank {rank.rank} of the pipeline, the fullest" if len(found.memory) > 1 else "of a rank"
    yield f"memory {where}: each row when it is most, the peak is the fullest moment"
    yield from table([*_memory_rows(found, rank), *_peak_rows(found, device)])
    if len(found.memory) > 1:
        yield ""
        yield from _by_rank(found.memory)
    yield ""
    yield "a step"
    yield from table([*_work_rows(found, device)])
    if found.time is not None and found.time.links:
        yield ""
        yield "what a rank sends in a step (times and bytes are counted, seconds are modelled)"
        yield from _link_rows(found.time)
    yield ""
    yield "disk"
    yield from table([*_disk_rows(found)])


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each row, a column for each way of knowing."""
    name = max(len(row.name) for row in rows) + 2
    width = max(11, *(len(row.value) for row in rows))
    yield " ".join([" " * name, *(f"{column:>{width}}" for column in COLUMNS)])
    for row in rows:
        cells = [f"{row.value if row.known == column else '':>{width}}" for column in COLUMNS]
        yield " ".join([f"  {row.name:{name - 2}}", *cells, f" {row.note}"]).rstrip()


def _memory_rows(found: Estimate, rank: RankMemory) -> Iterator[Row]:
    where = f"{gib(rank.waiting)} of them on the host" if rank.waiting else ""
    yield Row("parameters", gib(rank.parameters), "counted", where)
    yield Row("gradients", gib(rank.gradients), "counted")
    yield Row("moments", gib(rank.moments), "counted", f"of {found.optimizer}")
    if rank.average:
        yield Row("average", gib(rank.average), "counted")
    flight = "" if rank.in_flight == 1 else f"of {rank.in_flight} micro-batches"
    yield Row("saved activations", gib(rank.saved), "counted", flight)
    yield Row("inputs and what the stem makes", gib(rank.stream), "counted")
    if rank.head:
        yield Row("head and loss", gib(rank.head), "counted", "while the head runs")
    if rank.gathered:
        yield Row("gathered weights", gib(rank.gathered), "modelled")
    yield Row("the layer that runs", gib(rank.transient), "modelled", rank.moment)
    if rank.host:
        yield Row("on the host", gib(rank.host), "counted")
    if (encoders := found.encoders) is not None:
        what = ", ".join(encoders.folders)
        if encoders.bytes is None:
            yield Row("encoders", "unknown", "counted", f"{what}: --data.encoders is not here")
        else:
            note = "on the device always" if encoders.stays else "on the host while the model trains"
            yield Row("encoders", gib(encoders.bytes), "counted", f"{note}; without what they make")


def _peak_rows(found: Estimate, device: Device | None) -> Iterator[Row]:
    if device is None:
        yield Row("peak", gib(found.peak), "modelled")
        return
    left = device.memory - found.peak
    unknown = ", without encoders" if found.encoders is not None and found.encoders.bytes is None else ""
    yield Row(
        "peak",
        gib(found.peak),
        "modelled",
        f"✓ fits, {gib(left)} are left{unknown}" if left >= 0 else f"✗ {gib(-left)} too much{unknown}",
    )
    yield Row("memory of the device", gib(device.memory), "constant", device.name)
    if found.fullest.host:
        over = found.fullest.host > device.host_memory
        yield Row("memory of the host, a device", gib(device.host_memory), "constant", "✗ too little" if over else "")


def _by_rank(ranks: Sequence[RankMemory]) -> Iterator[str]:
    """What differs from stage to stage."""
    names = ("parameters", "gradients", "moments", "saved", "gathered", "transient", "host", "peak")
    cells = [["rank", "layers", "waiting", *names]]
    for rank in ranks:
        layers = sum(unit.name not in ("stem", "head") for unit in rank.layers)
        cells.append([str(rank.rank), str(layers), str(rank.in_flight), *(gib(getattr(rank, name)) for name in names)])
    yield from _columns(cells)


def _columns(cells: Sequence[Sequence[str]], words: Sequence[int] = ()) -> Iterator[str]:
    """A line for each row; columns of `words` begin at the left, all others end at the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        sides = ["<" if place in words else ">" for place in range(len(row))]
        line = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)]
        yield ("  " + "  ".join(line)).rstrip()


def _work_rows(found: Estimate, device: Device | None) -> Iterator[Row]:
    """What a step computes and sends, and how long that takes."""
    flops = f"{found.flops / 1e15:,.2f} PFLOP"
    yield Row("computed, on all ranks", flops, "counted", "of training; recomputation is not in it")
    time = found.time
    if time is None or device is None:
        return
    names = ", ".join(time.kernels)
    parts = (
        ("matrix products", time.gemm, ""),
        ("attention", time.attention, names),
        ("bound by memory", time.memory, ""),
        ("waiting for other ranks", time.communication, ""),
        ("waiting for the host", time.offload, ""),
        ("bubble", time.bubble, f"of {found.layout.pp} stages"),
        ("optimizer", time.optimizer, "" if found.optimizer == "adamw" else "as of AdamW"),
    )
    for name, took, note in parts:
        if took:
            yield Row(name, seconds(took), "modelled", note)
    largest = "a step of the largest samples" if found.share < 0.999 else "a step"
    yield Row(largest, seconds(time.total), "modelled")
    if found.share < 0.999:
        yield Row("a step of the mean", seconds(found.seconds), "modelled")
    yield Row("MFU", f"{100 * time.mfu:.1f} %", "modelled")
    yield Row("tokens a second", f"{found.tokens / found.seconds:,.0f}", "modelled", "of all ranks")
    days, hours = found.days, found.days * 24 * found.world
    yield Row(f"{found.steps:,} steps", f"{days:,.2f} days", "modelled", f"{hours:,.0f} device-hours, without encoding")
    peak = device.peak_of(found.dtype) / 1e12
    yield Row("peak", f"{peak:,.0f} TFLOP/s", "constant", f"{found.dtype}, dense")
    yield Row("memory's bandwidth", f"{device.bandwidth / 1e12:.2f} TB/s", "constant")
    for name, rate in (("link", device.link), ("network", device.network)):
        if any(link.over == name for link in time.links):
            yield Row(name, f"{rate / 1e9:,.0f} GB/s", "constant", "one way, a device")


def _link_rows(time: StepTime) -> Iterator[str]:
    """Each kind of collective: what it sends over which link, and how long others wait for it."""
    cells = [["what", "collective", "ranks", "link", "times", "bytes", "takes", "waited"]]
    for link in time.links:
        each = link.traffic
        over = f"{link.over}, behind {each.overlaps_with}" if each.overlaps_with else link.over
        cells.append([each.what, each.op, f"{each.ranks:,} ({each.axis})", over, f"{each.count:,}"])
        cells[-1] += [gib(each.bytes_sent), seconds(link.seconds), seconds(link.waited)]
    yield from _columns(cells, words=(0, 1, 2, 3))


def _disk_rows(found: Estimate) -> Iterator[Row]:
    disk = found.disk
    most = "" if found.optimizer == "adamw" else "at most; "
    yield Row("a checkpoint", gib(disk.checkpoint), "counted", f"{most}{disk.checkpoints} at one time")
    yield Row("weights in the end", gib(disk.exported), "counted")
    yield Row("disk of the run", gib(disk.run), "modelled")
    if disk.feature:
        yield Row("features of a clip", gib(disk.feature), "counted", f"{gib(1000 * disk.feature)} for 1,000")


def _help(subject: Subject, config: Config, world: int, device: Device) -> Iterator[str]:
    """What takes less memory, and what each leaves; and what else there is, where none fits."""
    now = subject.estimate(config, world).peak
    ways = [with_memory(config, memory) for memory in MEMORIES]
    if config.has_frozen and config.parallel.tp == 1:
        bases = [{"base": "nf4"}, {"base": "nf4", "host_layers": sum(1 for _ in subject.model.layers)}]
        ways += [with_memory(config, MEMORIES[-1] | base) for base in bases]
    fits = False
    yield ""
    yield "what would take less"
    for way in ways:
        try:
            found = subject.estimate(way, world)
        except ValueError:
            continue
        if way.memory == config.memory or found.peak >= now > device.memory:
            continue
        fits |= found.fits(device)
        over = found.peak <= device.memory and not found.fits(device)
        host = f"  {gib(max(rank.host for rank in found.memory))} are too much for the host" if over else ""
        more = [name for name in ("base", "host_layers") if getattr(way.memory, name) != getattr(config.memory, name)]
        names = ["recompute", "offload", *more]
        said = " ".join(f"--memory.{name} {getattr(way.memory, name)}" for name in names)
        yield f"  {said:98} {gib(found.peak):>12} {'✓' if found.fits(device) else '✗'}{host}"
    yield "  --search looks at all layouts" if world > 1 else "  more ranks, with --world"
    if not fits:
        yield "  smaller samples, with --size, or with what the data is"


def gib(size: float) -> str:
    """12.34 GiB, or in MiB or KiB what is small."""
    if not size or size >= 2**27:
        return f"{size / 2**30:,.2f} GiB"
    return f"{size / 2**20:,.2f} MiB" if size >= 2**17 else f"{size / 2**10:,.2f} KiB"


def seconds(time: float) -> str:
    """12.34 s, or in milliseconds what is short."""
    return f"{time:,.2f} s" if time >= 0.1 or not time else f"{1e3 * time:,.2f} ms"


def to_json(found: Estimate) -> dict[str, Any]:
    """All numbers of an estimate, bytes, seconds and FLOPs; of layers only the sums."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.name != "layers"}
        return [plain(one) for one in value] if isinstance(value, list | tuple) else value

    return plain(found) | {"peak": found.peak}


# Layouts


def _search(subject: Subject, config: EstimateConfig, world: int, device: Device, argv: Sequence[str]) -> Iterator[str]:
    """The best layouts, why others are not, and how to start the first."""
    found = search(subject, config, world, device)
    if config.json is not None:
        options = [to_json(option.estimate) for option in found.best]
        replace_file(config.json, json.dumps(options, indent=2) + "\n")
    ranks = f"{world:,} rank{'s' * (world > 1)} of {device.name}"
    yield f"samples    {subject.samples.source}"
    yield (
        f"looked at  {found.looked:,} combinations of layout, recompute, offload and micro-batch on {ranks}; "
        f"{found.small:,} are far too large"
    )
    if found.illegal:
        yield f"           {found.illegal:,} more layouts do not go with the model or the batch"
    if not found.best:
        if found.faster:
            yield ""
            yield "nearest to fitting"
            yield from _options(found.faster, device)
        ways = ["more ranks", "--memory.offload_params true", *(["LoRA"] if not config.lora.rank else [])]
        raise ValueError(f"no layout of {ranks} fits: take {', '.join(ways)}, or smaller samples")
    yield ""
    yield from _options(found.best)
    if found.faster:
        yield ""
        yield "these would be faster, and do not fit"
        yield from _options(found.faster, device)
    yield ""
    data = config.data.features, config.data.manifest, config.data.conversations
    if missing := ["--weights"] * (not config.weights) + ["data"] * (not any(data)):
        yield f"the command to start, when {' and '.join(missing)} are given, too"
    yield command(found.best[0].config, argv, world, device.per_host)


def _options(options: Sequence[Option], device: Device | None = None) -> Iterator[str]:
    cells = [["s/step", "MFU", "peak", "host", "layout"]]
    for option in options:
        one = option.estimate
        why = f"  ✗ {_why(one, device)}" if device else ""
        host = gib(max(rank.host for rank in one.memory))
        took = f"{one.seconds:,.2f}" if one.seconds >= 1 else f"{one.seconds:.4f}"
        cells.append([took, f"{100 * one.time.mfu:.1f} %", gib(one.peak), host, describe(option.config) + why])
    yield from _columns(cells, words=(4,))


def _why(found: Estimate, device: Device) -> str:
    """Which bytes are too many, and by how much."""
    rank = max(found.memory, key=lambda rank: rank.host)
    if found.peak <= device.memory:
        return f"{gib(rank.host - device.host_memory)} too much on the host ({gib(device.host_memory)} for a device)"
    full = found.fullest
    parts = {name: getattr(full, name) for name in ("parameters", "gradients", "moments", "saved", "gathered")}
    name = max(parts, key=parts.get)
    return f"{gib(found.peak - device.memory)} too much; most are {WORDS.get(name, name)}, {gib(parts[name])}"

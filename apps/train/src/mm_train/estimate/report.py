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
from mm_train.config import Config
from mm_train.estimate.config import EstimateConfig
from mm_train.estimate.estimate import Estimate, Subject
from mm_train.estimate.layouts import MEMORIES, command, describe, with_memory
from mm_train.estimate.search import Option, search
from mm_train.estimate.workload import find_samples

Known = Literal["counted", "modelled", "constant"]
"""counted: by running the code without values. modelled: by a formula. constant: of a device, from a table."""
COLUMNS: tuple[Known, ...] = ("counted", "modelled", "constant")
DAY = 24 * 3600


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
    if device is not None and found.peak > device.memory:
        yield from _help(subject, config, world, device)


def _lines(found: Estimate, config: Config, device: Device | None) -> Iterator[str]:
    trained = "" if found.trained == found.parameters else f", {found.trained:,} trained"
    yield f"model      {found.model}: {found.parameters:,} parameters{trained}, matrices in {config.dtype}"
    yield f"task       {found.task}"
    yield f"samples    {found.samples}"
    yield f"ranks      {found.world}{f' of {device.name}' if device else ''}: {describe(config, found.layout)}"
    each = f"{found.micro_batches} micro-batch{'es' * (found.micro_batches > 1)} a rank"
    yield f"step       {config.data.global_batch} samples, {each}, {found.tokens:,.0f} tokens"
    yield ""
    rank = found.fullest
    where = f"of rank {rank.rank} of the pipeline, the fullest" if len(found.memory) > 1 else "of a rank"
    yield f"memory {where}, at its peak"
    yield from table([*_memory_rows(found, rank), *_peak_rows(found, device)])
    if len(found.memory) > 1:
        yield ""
        yield from _by_rank(found.memory)
    yield ""
    yield "a step"
    yield from table([*_work_rows(found, device)])
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
    yield Row("parameters", gib(rank.parameters), "counted")
    yield Row("gradients", gib(rank.gradients), "counted")
    yield Row("moments", gib(rank.moments), "counted", "of AdamW, float32")
    if rank.average:
        yield Row("average", gib(rank.average), "counted")
    flight = "" if rank.in_flight == 1 else f"of {rank.in_flight} micro-batches"
    yield Row("saved activations", gib(rank.saved), "counted", flight)
    yield Row("inputs and what the stem makes", gib(rank.stream), "counted")
    if rank.head:
        yield Row("logits and loss", gib(rank.head), "counted", "while the head runs")
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
    yield Row(
        "peak",
        gib(found.peak),
        "modelled",
        f"✓ fits, {gib(left)} are left" if left >= 0 else f"✗ {gib(-left)} too much",
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
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))


def _work_rows(found: Estimate, device: Device | None) -> Iterator[Row]:
    """What a step computes and sends, and how long that takes."""
    yield Row(
        "FLOPs, of all ranks", f"{found.flops / 1e15:,.2f} P", "counted", "of training; recomputation is not in it"
    )
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
        ("optimizer", time.optimizer, ""),
    )
    for name, seconds, note in parts:
        if seconds:
            yield Row(name, f"{seconds:,.3f} s", "modelled", note)
    yield Row("a step of the largest samples", f"{time.total:,.3f} s", "modelled")
    if found.share < 0.999:
        yield Row("a step of the mean", f"{found.seconds:,.3f} s", "modelled")
    yield Row("MFU", f"{100 * time.mfu:.1f} %", "modelled")
    yield Row("tokens a second", f"{found.tokens / found.seconds:,.0f}", "modelled")
    days, hours = found.days, found.days * 24 * found.world
    yield Row(f"{found.steps:,} steps", f"{days:,.2f} days", "modelled", f"{hours:,.0f} device-hours, without encoding")
    peak = device.peak_of(found.dtype) / 1e12
    yield Row("peak", f"{peak:,.0f} TFLOP/s", "constant", f"{found.dtype}, dense")
    yield Row("memory's bandwidth", f"{device.bandwidth / 1e12:.2f} TB/s", "constant")
    for name, rate in (("link", device.link), ("network", device.network)):
        if any(link.over == name for link in time.links):
            yield Row(name, f"{rate / 1e9:,.0f} GB/s", "constant", "one way, a device")
    for link in time.links:
        each = link.traffic
        said = f"{each.count:,} x {each.op} over {each.ranks} ranks ({each.axis}), {link.over}: {link.seconds:.3f} s"
        behind = f" behind {each.overlaps_with}" if each.overlaps_with else ""
        waited = f"{said}{behind}, {link.waited:.3f} s waited"
        yield Row(f"sent: {each.what}", gib(each.bytes_sent), "counted", waited)


def _disk_rows(found: Estimate) -> Iterator[Row]:
    disk = found.disk
    yield Row("a checkpoint", gib(disk.checkpoint), "counted", f"{disk.checkpoints} at one time")
    yield Row("weights in the end", gib(disk.exported), "counted")
    yield Row("disk of the run", gib(disk.run), "modelled")
    if disk.feature:
        yield Row("features of a clip", gib(disk.feature), "counted", f"{gib(1000 * disk.feature)} for 1,000")


def _help(subject: Subject, config: Config, world: int, device: Device) -> Iterator[str]:
    """What would make it fit, one change at a time, and what each leaves."""
    yield ""
    yield "what would help"
    asked = {field: getattr(config.memory, field) for field in ("recompute", "offload")}
    ways = [with_memory(config, memory) for memory in MEMORIES if memory != asked]
    for way in ways:
        try:
            peak = subject.estimate(way, world).peak
        except ValueError:
            continue
        said = f"--memory.recompute {way.memory.recompute} --memory.offload {way.memory.offload}"
        yield f"  {said:60} {gib(peak)} {'✓' if peak <= device.memory else '✗'}"
    yield "  --search true looks at all layouts"


def gib(size: float) -> str:
    """12.34 GiB, or in MiB what is small."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 or not size else f"{size / 2**20:,.2f} MiB"


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
    yield f"samples    {subject.samples.source}"
    yield (
        f"looked at  {found.looked:,} layouts of {world:,} ranks of {device.name}; {found.small:,} cannot hold what "
        f"layers save; {found.illegal:,} others do not go with the model or the batch"
    )
    if not found.best:
        raise ValueError(
            f"no layout of {world} ranks of {device.name} fits: take more ranks, --memory.offload_params true, or LoRA"
        )
    yield ""
    yield from _options(found.best)
    if found.faster:
        yield ""
        yield "these would be faster, and do not fit"
        yield from _options(found.faster, device)
    yield ""
    yield command(found.best[0].config, argv, world, device.per_host)


def _options(options: Sequence[Option], device: Device | None = None) -> Iterator[str]:
    cells = [["s/step", "MFU", "peak", "host", "layout"]]
    for option in options:
        one = option.estimate
        why = f"  ✗ {_why(one, device)}" if device else ""
        host = gib(max(rank.host for rank in one.memory))
        cells.append(
            [f"{one.seconds:,.2f}", f"{100 * one.time.mfu:.1f} %", gib(one.peak), host, describe(option.config) + why]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for *row, layout in cells:
        yield "  " + "  ".join([*(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False)), layout])


def _why(found: Estimate, device: Device) -> str:
    """Which bytes are too many, and by how much."""
    rank = max(found.memory, key=lambda rank: rank.host)
    if found.peak <= device.memory:
        return f"{gib(rank.host - device.host_memory)} too much on the host ({gib(device.host_memory)} for a device)"
    full = found.fullest
    parts = {name: getattr(full, name) for name in ("parameters", "gradients", "moments", "saved", "gathered")}
    name = max(parts, key=parts.get)
    return f"{gib(found.peak - device.memory)} too much; most are {name}, {gib(parts[name])} ({full.moment})"

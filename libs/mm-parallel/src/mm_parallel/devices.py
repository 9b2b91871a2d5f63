"""What is known of devices by name, from `devices.toml` and from a file of the user's own. Needs no torch."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

Share = Annotated[float, "> 0", "<= 1"]
Rate = Annotated[float, "> 0"]
_GIB = 2**30


@dataclass(frozen=True)
class Shares:
    """Shares of a device's peaks that kernels reach."""

    gemm: Share
    """Of the peak: matrix products."""
    memory: Share
    """Of the memory's bandwidth: what is bound by it."""
    collective: Share
    """Of link and network."""
    launch: Annotated[float, ">= 0"]
    """Seconds that a kernel takes at least."""
    attention: Mapping[str, tuple[Share, Share]]
    """Of the peak, by the kernel's name: forward, backward."""


@dataclass(frozen=True)
class Device:
    """One device, and the hosts in which it stands. Bytes, and bytes or FLOP/s."""

    name: str
    kind: Literal["cuda", "npu"]
    """torch's type of device."""
    names: tuple[str, ...]
    """Parts of the name that the device says of itself."""
    memory: Rate
    """Bytes that torch can use."""
    bandwidth: Rate
    link: Rate
    """To devices of the same host, one way."""
    network: Rate
    """To those of other hosts, one way."""
    host_link: Rate
    """To the host's memory, one way."""
    per_host: Annotated[int, ">= 1"]
    host_memory: Rate
    """For each device."""
    peak: Mapping[str, float]
    """Dense FLOP/s by torch's name of the dtype."""
    shares: Shares = field(repr=False)
    capability: tuple[int, int] = (0, 0)
    """Of a CUDA device."""
    cudnn: bool = True

    def peak_of(self, dtype: str) -> float:
        """ValueError for a dtype of which no figure is known."""
        if dtype not in self.peak:
            known = ", ".join(self.peak)
            raise ValueError(
                f"no peak of {self.name} in {dtype} is known ({known} is): compute in one of these, or give the "
                "figure in a file of devices of your own"
            )
        return self.peak[dtype]

    @classmethod
    def read(cls, name: str, said: Mapping[str, Any], shares: Mapping[str, Any]) -> Self:
        """From a table of the file. ValueError for what is missing, unknown or out of bounds."""
        if not isinstance(said, Mapping):
            raise ValueError(f"device {name}: {said!r} is no table: begin one with [{name}]")
        said = dict(said)
        kernels = said.pop("kernels", None)
        if kernels not in shares:
            raise ValueError(f"device {name}: kernels={kernels!r}, but there are {', '.join(shares)}")
        wanted = {f.name for f in fields(cls)} - {"name", "shares"}
        missing = sorted(wanted - set(said) - {"capability", "cudnn"})
        unknown = sorted(set(said) - wanted)
        if missing or unknown:
            words = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(unknown)} unknown"] * bool(
                unknown
            )
            raise ValueError(f"device {name}: {'; '.join(words)}")
        if not isinstance(said["names"], list):
            raise ValueError(f'device {name}: names must be a list, as ["H100"]')
        said |= {"names": tuple(said["names"]), "capability": tuple(said.get("capability", (0, 0)))}
        numbers = {key: said[key] for key in ("memory", "bandwidth", "link", "network", "host_link", "host_memory")}
        if not isinstance(said["peak"], Mapping):
            raise ValueError(f"device {name}: peak must be a table, as {{ bfloat16 = 989e12 }}")
        numbers |= said["peak"] | {"per_host": said["per_host"]}
        wrong = [f"{key}={value!r}" for key, value in numbers.items() if not _above_zero(value)]
        if wrong:
            raise ValueError(f"device {name}: {', '.join(wrong)} must be above 0, and a number")
        said |= {"memory": said["memory"] * _GIB, "host_memory": said["host_memory"] * _GIB}
        return cls(name=name, shares=_read_shares(kernels, shares[kernels]), **said)


def _above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _read_shares(name: str, said: Mapping[str, Any]) -> Shares:
    wanted = {f.name for f in fields(Shares)}
    if not isinstance(said, Mapping):
        raise ValueError(f"kernels.{name}: {said!r} is no table: begin one with [kernels.{name}]")
    if set(said) != wanted:
        raise ValueError(f"kernels.{name}: has {', '.join(said)}, but needs {', '.join(sorted(wanted))}")
    if not isinstance(said["attention"], Mapping):
        raise ValueError(f"kernels.{name}: attention must be a table, as {{ flash = [0.5, 0.4] }}")
    attention = {kernel: tuple(pair) for kernel, pair in said["attention"].items()}
    rates = {key: said[key] for key in ("gemm", "memory", "collective")}
    rates |= {f"attention.{kernel}": share for kernel, pair in attention.items() for share in pair}
    wrong = [f"{key}={value}" for key, value in rates.items() if not (_above_zero(value) and value <= 1)]
    if wrong or any(len(pair) != 2 for pair in attention.values()):
        raise ValueError(
            f"kernels.{name}: {', '.join(wrong) or 'attention'}: shares are above 0 and at most 1, and two "
            "for each kernel of attention: forward, backward"
        )
    return Shares(**{**said, "attention": attention})


def read_devices(own: Path | None = None) -> dict[str, Device]:
    """All devices by name, in the order of the file; own: a file of the user's, whose tables take their place.

    Raises ValueError for a file that cannot be read, with the table and the field.
    """
    known = tomllib.loads(files("mm_parallel").joinpath("devices.toml").read_text(encoding="utf-8"))
    if own is not None:
        try:
            given = tomllib.loads(own.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{own} is no table of devices: {error}") from error
        kernels = known["kernels"] | given.pop("kernels", {})
        known = given | {name: table for name, table in known.items() if name not in given} | {"kernels": kernels}
    shares = known.pop("kernels")
    return {name: Device.read(name, table, shares) for name, table in known.items()}


def find_device(name: str, own: Path | None = None) -> Device:
    """One of them by name; case, spaces and hyphens do not matter: `RTX 4090`. ValueError for one that there is not,
    with those that there are.
    """
    devices = read_devices(own)
    for known, device in devices.items():
        if _plain(known) == _plain(name):
            return device
    near = [known for known in devices if _plain(name) and _plain(name) in _plain(known)]
    near = near or get_close_matches(name.lower(), devices, n=1)
    meant = f", do you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"no device is named {name!r}{meant}: there are {', '.join(devices)}; "
        "one of your own stands in a TOML file like devices.toml of mm_parallel"
    )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


@cache
def _by_part() -> list[tuple[str, Device]]:
    return [(part, device) for device in read_devices().values() for part in device.names]


def recognize(device_name: str) -> Device | None:
    """The device of the table by the name that it says of itself, as `nvidia-smi -L` or `npu-smi info` print it."""
    return next((device for part, device in _by_part() if part in device_name), None)

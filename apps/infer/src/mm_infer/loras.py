"""The adapters that are asked for: where each lies, on which expert it acts, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_convert import Adapter, open_experts, open_lora

EXPERTS = ("high", "low")


@dataclass(frozen=True)
class Lora:
    """One of them, as it was asked for."""

    path: Path
    expert: str = ""
    """Of two experts the one that it is for: "high" or "low"; "": for both, or for the one model."""
    strength: float = 1.0
    alpha: float | None = None
    """Where its files do not say it."""

    def on(self, expert: str) -> bool:
        """Whether it acts on this expert ("": the one model)."""
        return self.expert in ("", expert)

    def open(self, expert: str) -> Adapter:
        """That for an expert, or for the one model (""); only headers are read. ValueError as `open_lora`, and for a
        pair where there is one model.
        """
        pair = open_experts(self.path)
        if pair is not None and not expert:
            raise ValueError(
                f"lora {self.path} is for two experts, but the weights are one model: name one of its folders"
            )
        return open_lora(getattr(pair, expert) if pair else self.path, alpha=self.alpha, expert=expert)


def read_loras(
    lora: Path | str | Sequence[Path | str] | None,
    strength: float | Sequence[float] = 1.0,
    alpha: float | None = None,
) -> tuple[Lora, ...]:
    """The adapters of the flags --lora, --lora_strength and --lora_alpha. No file is opened.

    ValueError for strengths that are not as many, one that is given twice, and an alpha for several.
    """
    paths = [lora] if isinstance(lora, Path | str) else [*(lora or ())]
    strengths = [strength] * len(paths) if isinstance(strength, int | float) else [*strength]
    if not paths and strength != 1.0:
        raise ValueError(f"lora_strength {strength} is that of an adapter: name it (lora), or leave it out")
    if len(strengths) != len(paths):
        raise ValueError(
            f"lora_strength has {len(strengths)} numbers, and there are {len(paths)} adapters (lora): give one number "
            "for all, or one for each, in their order"
        )
    if alpha is not None and not paths:
        raise ValueError(f"lora_alpha {alpha} is that of an adapter: name it (lora), or leave it out")
    if alpha is not None and len(paths) > 1:
        raise ValueError(
            f"lora_alpha {alpha} is of one adapter, and there are {len(paths)}: write it into the one that lacks it "
            "(mm-convert convert ADAPTER TARGET --lora_alpha …)"
        )
    found: list[Lora] = []
    for path, strength in zip(paths, strengths, strict=True):
        expert, where = _split(path)
        one = Lora(where, expert, float(strength), alpha)
        twice = [o for o in found if o.path.absolute() == where.absolute() and (o.on(expert) or one.on(o.expert))]
        if twice:
            raise ValueError(f"lora {path} is given twice: to act more strongly, give it once with --lora_strength")
        found.append(one)
    return tuple(found)


def _split(path: Path | str) -> tuple[str, Path]:
    """("high", a) of `high=a`; ("", a) of any other, also of a file whose own name begins so."""
    expert, equals, rest = str(path).partition("=")
    if equals and expert in EXPERTS and rest and not Path(path).exists():
        return expert, Path(rest)
    return "", Path(path)

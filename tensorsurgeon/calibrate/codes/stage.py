"""A calibrated run between two layers, and a layer as what leads from one stage to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tensorsurgeon.calibrate.codes.assembly import Assemblies
from tensorsurgeon.calibrate.codes.linears import Linear
from tensorsurgeon.calibrate.log import LogRow, rounded_row
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.quant.scheme import Quantized


@dataclass(frozen=True, slots=True)
class Stage:
    """The layer that comes next, and the states that go into it: None where it needs none, or nothing comes next.

    ``original``: what the original layers before it put out, where that is carried along and is not the same.
    ``handed``: a digest of what layers handed on beside states, where they do.
    """

    layer: int
    states: HiddenStates | None
    original: HiddenStates | None = None
    handed: str | None = None

    @property
    def _carried(self) -> list[HiddenStates]:
        return [states for states in (self.states, self.original) if states is not None]

    @property
    def digest(self) -> str | None:
        """Of the states, of the original ones behind a bar, and behind a hash of what was handed on beside them."""
        states = "|".join(states.digest for states in self._carried)
        return (f"{states}#{self.handed}" if self.handed else states) if states else None

    def sync(self) -> None:
        """Make the states durable."""
        for states in self._carried:
            states.sync()

    def close(self) -> None:
        """Let go of the states' files, which stay."""
        for states in self._carried:
            states.close()


class Layer(NamedTuple):
    """What a layer came to; ``codes`` by module, None for one that is rounded to nearest by decision."""

    codes: dict[str, Quantized | None]
    rows: list[LogRow]
    next: Stage


def layer_of(linears: Sequence[Linear], made: Assemblies, without: Mapping[int, str], following: Stage) -> Layer:
    """The codes that were made, and the linears ``without`` statistics, which are rounded for the reason given."""
    codes: dict[str, Quantized | None] = {linears[number].module: found for number, found in made.quantized().items()}
    codes |= dict.fromkeys((linears[number].module for number in without), None)
    rows = made.rows() + [rounded_row(linears[n].layer, linears[n].module, reason) for n, reason in without.items()]
    return Layer(codes, rows, following)


class Layers(Protocol):
    """Where statistics come from: a walk through the model, or files."""

    def first(self) -> Stage:
        """The stage before any layer."""
        ...

    def resumed(self, layer: int, digest: str | None) -> Stage:
        """The stage that an earlier run reached; JournalError if its states are not what ``digest`` says."""
        ...

    def quantize(self, stage: Stage, linears: Sequence[Linear], *, is_last: bool) -> Layer:
        """Codes for the linears of the stage's layer, and the next stage, whose states may still have to be made durable."""
        ...

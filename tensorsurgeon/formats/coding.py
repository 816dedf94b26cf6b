"""What a rewrite of quantized modules carries: how they are stored that it reads, how they are written that it makes.

A step finds this out once, when it plans. The config, the report, calibration and the executor read it from the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import TypeVar

from tensorsurgeon.formats.base import Format
from tensorsurgeon.quant.scheme import Scheme

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Stored:
    """The detail of a rewrite that reads a module of a quantized source.

    ``names``: its tensors by local name, in the order of the rewrite's inputs. ``transposed``: the float weight lies [in, out].
    """

    format: Format
    scheme: Scheme
    names: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """The detail of a rewrite that writes a quantized module, one object for all that are written alike.

    ``scheme`` is resolved: how its scales are stored is known. ``activations`` is what the config tells engines to do with
    inputs, None for the format's default. ``method`` chooses the codes: ``rtn`` from the weight alone, any other in
    calibration; ``kept`` chooses none, they were there. ``where`` and ``exclude`` are the patterns that the step chose its
    weights by.
    """

    format: Format
    scheme: Scheme
    activations: str | None = None
    method: str = "rtn"
    where: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def is_calibrated(self) -> bool:
        """Whether calibration chooses the codes."""
        return self.method not in ("rtn", "kept")


@dataclass(frozen=True, slots=True)
class Repacked:
    """A module read in one layout and written in another, its codes kept."""

    stored: Stored
    written: Written


def written_by(detail: Hashable) -> Written | None:
    """How a rewrite with this detail writes its modules; None if it writes no quantized ones."""
    return detail.written if isinstance(detail, Repacked) else detail if isinstance(detail, Written) else None


def stored_in(detail: Hashable) -> Stored | None:
    """How the module is stored that a rewrite with this detail reads; None if it reads no quantized one."""
    return detail.stored if isinstance(detail, Repacked) else detail if isinstance(detail, Stored) else None


def each_object_once(details: Collection[T]) -> list[T]:
    """Each object once, by identity: thousands of modules share a few, and to hash each would take longer than to plan it."""
    return list(dict(zip(map(id, details), details, strict=True)).values())

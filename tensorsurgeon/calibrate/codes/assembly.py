"""Codes of a layer's linears while their parts come in, and what the log will say of each."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import ml_dtypes
import numpy as np
from torch import Tensor

from tensorsurgeon.calibrate.codes.linears import Linear, Part
from tensorsurgeon.calibrate.log import LogRow
from tensorsurgeon.quant.scheme import Quantized, Scheme


class Rounded(NamedTuple):
    """The result for a stack of rows, on the CPU, as it is packed (FP8 codes as bytes); losses are per row, or None where
    nothing could be measured."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    loss: np.ndarray | None
    energy: np.ndarray | None
    method: str
    damp_percent: float | None
    note: str
    global_scale: np.ndarray | None = None


@dataclass
class _Assembly:
    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    expert: int | None
    scheme: Scheme
    global_scale: np.ndarray | None = None
    methods: set[str] = field(default_factory=set)
    notes: set[str] = field(default_factory=set)
    tokens: list[int] = field(default_factory=list)
    damping: list[float] = field(default_factory=list)
    # By the part's first row: threads come in any order, sums must not.
    losses: dict[int, tuple[float, float]] = field(default_factory=dict)
    seconds: float = 0.0


class Assemblies:
    """One array of codes and scales per linear that has parts; parts are put from any thread, in any order."""

    def __init__(self, linears: Sequence[Linear], parts: Sequence[Part]) -> None:
        self._linears = linears
        self._lock = threading.Lock()
        self._made = {part.linear: _empty(linears[part.linear], part.expert) for part in sorted(parts, key=lambda p: p.linear)}

    def put(self, part: Part, rounded: Rounded, rows: slice, tokens: int, seconds: float) -> None:
        """Take a part's codes from ``rows`` of a result."""
        made = self._made[part.linear]
        here = slice(part.start, part.stop)
        with self._lock:
            made.codes[here] = rounded.codes[rows].numpy()
            made.scale[scale_rows(here, made.scheme)] = rounded.scale[scale_rows(rows, made.scheme)].numpy()
            made.global_scale = rounded.global_scale
            if made.zero_point is not None and rounded.zero_point is not None:
                made.zero_point[here] = rounded.zero_point[rows].numpy()
            made.methods.add(rounded.method)
            made.notes.add(rounded.note)
            made.tokens.append(tokens)
            made.seconds += seconds
            if rounded.damp_percent is not None:
                made.damping.append(rounded.damp_percent)
            if rounded.loss is not None and rounded.energy is not None:
                made.losses[part.start] = float(rounded.loss[rows].sum()), float(rounded.energy[rows].sum())

    def is_as_started(self, part: Part, method: str) -> bool:
        """Whether a part's linear got its codes by ``method`` and nothing was to be said of it."""
        made = self._made[part.linear]
        return made.methods == {method} and made.notes == {""}

    def rows_of(self, part: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Codes, scales and zero points of a part's rows; they may be written to."""
        made, rows = self._made[part.linear], slice(part.start, part.stop)
        return made.codes[rows], made.scale[rows], None if made.zero_point is None else made.zero_point[rows]

    def tuned(self, linears: Collection[int], method: str | None, note: str, seconds: float) -> None:
        """Linears were tuned with their layer: ``method`` if that changed codes, which then have no loss of their own."""
        for number in linears:
            made = self._made[number]
            made.seconds += seconds / len(linears)
            made.notes.add(note)
            if method is not None:
                made.methods, made.losses = {method}, {}

    def quantized(self) -> dict[int, Quantized]:
        """Codes by the linear's number."""
        return {number: _quantized(made) for number, made in self._made.items()}

    def rows(self) -> list[LogRow]:
        """What the log says, in the order of the linears."""
        return [self._row(self._linears[number], made) for number, made in self._made.items()]

    def _row(self, linear: Linear, made: _Assembly) -> LogRow:
        loss = energy = None
        if made.losses:
            loss, energy = (sum(pair) for pair in zip(*(made.losses[start] for start in sorted(made.losses)), strict=True))
        relative = None if loss is None or not energy else loss / energy
        return LogRow(
            linear.layer, linear.module, made.expert, "+".join(sorted(made.methods)), min(made.tokens),
            max(made.damping, default=None), loss, relative, made.seconds, "; ".join(sorted(note for note in made.notes if note)),
        )  # fmt: skip


def _empty(linear: Linear, expert: int | None) -> _Assembly:
    rows, columns = linear.weight.shape
    scheme = linear.scheme
    height, width = scheme.block or (1, -(-columns // scheme.groups(columns)))
    zero_point = None if scheme.symmetric else np.zeros((rows, scheme.groups(columns)), np.int8)
    codes = np.empty((rows, columns), np.int8 if scheme.type == "int" else np.uint8)
    return _Assembly(codes, np.empty((-(-rows // height), -(-columns // width)), np.float32), zero_point, expert, scheme)


def _quantized(made: _Assembly) -> Quantized:
    codes = made.codes.view(ml_dtypes.float8_e4m3fn) if made.scheme.type == "fp8" else made.codes
    return Quantized(codes, made.scale, made.zero_point, made.global_scale)


def scale_rows(rows: slice, scheme: Scheme) -> slice:
    """The rows of scales that belong to rows of codes; blocks are whole, but for the last."""
    height = 1 if scheme.block is None else scheme.block[0]
    return slice(rows.start // height, -(-rows.stop // height))

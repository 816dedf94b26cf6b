"""Cells of a quantized weight against their source: one scale that is wrong, rows that changed places, flipped bits.

A cell is a row times one group of inputs (or 128 of them where groups are longer), w its source, q what readers
compute, e = q - w. Errors of rounding know nothing of the weight, so the *gain* of a cell,

    g = sum(w q) / sum(w w) = 1 + sum(w e) / sum(w w),

is 1 but for chance, with the deviation sqrt(noise / signal / n); a scale that is doubled makes it 2, a row that is
gone 0, another cell's codes about 0. How much chance there is, calibrated codes included, is measured on the weight
itself: the median of all cells, and how they scatter. What stands out is looked at code by code: those at the end of
the grid do not count, since clipping is a choice, and where rounding was to nearest no other error may be larger than
half a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.steps import MEDIAN_CELLS, Steps, rough_median
from tensorsurgeon.verifying.weights import CodedWeight, Weight

_LONGEST_CELL: Final = 128
# Cells of a block are judged together: enough for a median, few enough for memory.
_BLOCK_CELLS: Final = 1 << 16
_MOST_LOOKED_AT: Final = 16
_COMPARED_WITH: Final = 8
# Deviations from 1 that are worth a look, and those that chance never has.
_ODD, _IMPOSSIBLE = 4.0, 8.0
# A gain this near to 1 does no harm.
_HARMLESS: Final = 0.03
# The gain of a whole weight: chance is nothing there, and clipping takes more the fewer codes there are.
_GAIN: Final = {
    2: (0.60, 1.15),
    3: (0.85, 1.08),
    4: (0.92, 1.05),
    5: (0.95, 1.03),
    6: (0.96, 1.03),
    7: (0.97, 1.02),
    8: (0.97, 1.02),
}
# Half a step, and what scales cost that were rounded after the codes were chosen.
_HALF_STEP: Final = 0.56
_BEYOND_HALF: Final = 0.25
_NOT_NEAREST: Final = 0.002
_SHIFT: Final = 0.6
# Gains scatter as chance has it, calibrated codes and grids of floats up to twice as much; scales of other groups far more.
_SCATTER, _SCATTER_CELLS = 3.0, 64
# Errors beyond six times the median one: none where errors are rounding's, one in some thousands where they are normal.
# Of groups of a few inputs half the codes are at the end of the grid and have the error that their scale was rounded with.
_TAIL, _TAIL_SHARE, _TAIL_SIZE = 6.0, 0.01, 8
_ONE_STEP: Final = 1.0
_SAMPLE_ROWS: Final = 32


class OddCell(NamedTuple):
    """A cell whose error is none of rounding, and why in a clause."""

    row: int
    first_input: int
    message: str


class CellFacts(NamedTuple):
    """What the cells of one weight say: how many are odd, the first of them, and a clause about the whole weight."""

    odd: int
    first: OddCell | None
    complaint: str

    def describe(self) -> str:
        """A clause for a message; empty where all is as it should be."""
        if self.first is None:
            return self.complaint
        more = f", and so are {self.odd - 1} others" if self.odd > 1 else ""
        return f"the group of row {self.first.row} that begins at input {self.first.first_input} {self.first.message}{more}"


@dataclass(slots=True)
class _Block:
    """Sums over the cells of a run of rows: [rows, cells] each."""

    start: int
    signal: list[np.ndarray] = field(default_factory=list)
    noise: list[np.ndarray] = field(default_factory=list)
    cross: list[np.ndarray] = field(default_factory=list)
    mean: list[np.ndarray] = field(default_factory=list)
    step: list[np.ndarray] = field(default_factory=list)
    cells: int = 0


class CellJudge:
    """Takes the rows of a weight and its source in order; ``facts`` says what was odd."""

    def __init__(self, source: Weight, stored: CodedWeight, claim: Claim) -> None:
        self._source, self._stored, self._claim = source, stored, claim
        columns = source.shape[1]
        groups = stored.scale.shape[1]
        size = columns // groups if claim.block is None else claim.block[1]
        if columns % size:
            size = columns
        self.size = _LONGEST_CELL if size % _LONGEST_CELL == 0 else size
        self._order = None if stored.group_of_input is None else np.argsort(stored.group_of_input, kind="stable")
        self._is_integer = stored.code_range() is not None
        self._steps_of = Steps(source, stored, claim, self.size, self._order)
        self._block = _Block(0)
        self._sample = np.unique(np.linspace(0, source.shape[0] - 1, _SAMPLE_ROWS).astype(int))
        self._sampled: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._odd: list[OddCell] = []
        self._count = 0
        self._signal = self._cross = self._scatter = 0.0

    def decoded(self, start: int, weight: np.ndarray) -> np.ndarray:
        """float32 [rows, K]: what is stored beside the source from row ``start`` on; keeps the rows that ``facts`` looks at."""
        stop = start + len(weight)
        codes = self._stored.codes(start, stop)
        rows = self._sample[(self._sample >= start) & (self._sample < stop)]
        raw = codes[rows - start].astype(np.float32)
        value = self._stored.decoded(codes, start, stop)
        if len(rows):
            self._sampled.append(self._steps_of.of_rows(rows, weight[rows - start], raw, value[rows - start]))
        return value

    def take(self, start: int, weight: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [rows, K] from row ``start`` on: the source, and source minus what is stored; [rows] energies of both."""
        if self._order is not None:
            weight, error = weight[:, self._order], error[:, self._order]
        shape = len(weight), -1, self.size
        w, e = weight.reshape(shape), error.reshape(shape)
        block = self._block
        block.signal.append(np.einsum("ijk,ijk->ij", w, w))
        block.noise.append(np.einsum("ijk,ijk->ij", e, e))
        block.cross.append(-np.einsum("ijk,ijk->ij", w, e))
        if self._is_integer:
            block.step.append(self._steps(start, len(weight)))
            if not self._claim.symmetric:
                block.mean.append(-np.einsum("ijk->ij", e) / self.size)
        block.cells += w.shape[0] * w.shape[1]
        energies = block.signal[-1].sum(axis=1, dtype=np.float64), block.noise[-1].sum(axis=1, dtype=np.float64)
        if block.cells >= _BLOCK_CELLS:
            self._judge()
        return energies

    def _steps(self, start: int, rows: int) -> np.ndarray:
        """|scale| of each cell."""
        scale = np.abs(self._stored.scale_rows(start, start + rows))
        cells = self._source.shape[1] // self.size
        if scale.shape[1] != cells:
            scale = np.repeat(scale, -(-cells // scale.shape[1]), axis=1)[:, :cells]
        return np.broadcast_to(scale, (rows, cells))

    def facts(self) -> CellFacts:
        """After the last row."""
        if self._block.cells:
            self._judge()
        complaint = ""
        low, high = _GAIN[self._claim.num_bits]
        if self._claim.code_dtype.is_float or not self._is_integer:
            low, high = 0.94, 1.05
        gain = 1 + self._cross / self._signal if self._signal else 1.0
        if not low <= gain <= high:
            gain = self._gain_inside()
        if np.isfinite(gain) and not low <= gain <= high:
            complaint = f"weights are {gain:.3g} times their source on average, which rounding never makes: the scales are wrong"
        elif self._scatter > _SCATTER and not self._is_nearest():
            complaint = (
                f"its groups are too large and too small by {self._scatter:.1f} times what chance explains: their scales are "
                "those of other groups"
            )
        elif (share := self._tail()) > _TAIL_SHARE:
            complaint = (
                f"{share:.1%} of its codes are further off than {_TAIL:g} times the usual error: bits of them are flipped, "
                "or they are those of other weights"
            )
        first = min(self._odd) if self._odd else None
        return CellFacts(self._count, first, complaint)

    def _judge(self) -> None:
        block, self._block = self._block, _Block(self._block.start + sum(map(len, self._block.signal)))
        signal, noise, cross = (np.concatenate(parts) for parts in (block.signal, block.noise, block.cross))
        finite = np.isfinite(noise)
        self._signal += float(signal[finite].sum(dtype=np.float64))
        self._cross += float(cross[finite].sum(dtype=np.float64))
        known = finite & (signal > 0)
        if np.count_nonzero(known) < 4:
            return
        step = np.concatenate(block.step) if block.step else None
        # What rounding alone costs: a twelfth of a squared step for each weight, or for floats a share of the weight.
        ideal = signal if step is None else np.maximum(step * step * self.size / 12, 1e-30)
        usual = _median(noise / np.maximum(ideal, 1e-30), known)
        chance = np.sqrt(max(usual, 1e-6) * ideal / np.maximum(signal, 1e-30) / self.size)
        deviation = np.where(known, cross / np.maximum(signal, 1e-30), 0.0)
        z = np.where(known, deviation / np.maximum(chance, 1e-6), 0.0)
        middle = _median(z, known)
        spread = max(1.0, 1.4826 * _median(np.abs(z - middle), known))
        z = (z - middle) / spread
        # Errors of FP8 grow with the weight, so that a few large weights decide the gain of their cell.
        if np.count_nonzero(known) >= _SCATTER_CELLS and not self._claim.code_dtype.is_float:
            self._scatter = max(self._scatter, spread)
        odd = (np.abs(z) > _ODD) & (np.abs(deviation) > _HARMLESS)
        loud = known & (noise > 4 * max(usual, 1e-6) * ideal) & (noise > 1e-4 * signal)
        self._look(block.start, np.abs(z), odd | loud, noise / np.maximum(usual * ideal, 1e-30))
        if block.mean and step is not None:
            self._judge_shift(block.start, np.concatenate(block.mean) / np.maximum(step, 1e-30), usual)

    def _judge_shift(self, start: int, shift: np.ndarray, usual: float) -> None:
        """Zero points: a whole group too high or too low by a step, codes at the end of the grid apart."""
        least = max(_SHIFT, 6 * np.sqrt(max(usual, 1.0) / 12 / self.size))
        wrong = np.abs(shift) > least
        rows = np.flatnonzero(wrong.any(axis=1))
        for row in map(int, rows[np.argsort(-np.abs(shift[rows]).max(axis=1), kind="stable")][:_MOST_LOOKED_AT]):
            weight, value, error = (part.reshape(-1, self.size) for part in self._steps_of.row(start + row))
            inside = np.isfinite(value)
            signed = np.where(inside, np.sign(np.where(inside, value, 0) - weight) * error, 0)
            count = inside.sum(axis=1)
            mean = signed.sum(axis=1) / np.maximum(count, 1)
            # Where all weights have one sign the best zero point may lie outside of the grid.
            is_plain = (weight.min(axis=1) < 0) & (weight.max(axis=1) > 0) & (count * 4 > self.size)
            for cell in np.flatnonzero(wrong[row] & (np.abs(mean) > least) & is_plain):
                self._add(start + row, int(cell), f"is {mean[cell]:.2g} steps off on average: its zero point is wrong")

    def _add(self, row: int, cell: int, message: str) -> None:
        self._count += 1
        self._odd.append(OddCell(row, cell * self.size, message))

    def _look(self, start: int, z: np.ndarray, odd: np.ndarray, noise: np.ndarray) -> None:
        """Look at the oddest rows code by code, with some ordinary ones to compare with."""
        rows = np.flatnonzero(odd.any(axis=1))
        if not len(rows):
            return
        oddness = np.where(odd, np.maximum(z, np.sqrt(noise)), 0).max(axis=1)
        rows = rows[np.argsort(-oddness[rows], kind="stable")][:_MOST_LOOKED_AT]
        others = np.setdiff1d(np.linspace(0, len(odd) - 1, _COMPARED_WITH).astype(int), rows)
        usual = np.concatenate([self._steps_of.cells(start + int(row))[0] for row in others]) if len(others) else np.zeros(0)
        # 90 of 100 cells hold to this.
        bound = float(np.quantile(usual, 0.9)) if len(usual) else np.inf
        is_nearest = bound <= _HALF_STEP
        for row in sorted(map(int, rows)):
            largest, gain, chance = self._steps_of.cells(start + row)
            wrong = odd[row] & (np.abs(gain - 1) > np.maximum(_HARMLESS, _IMPOSSIBLE * chance * 1.5)) & (z[row] > _IMPOSSIBLE)
            wrong &= largest > _HALF_STEP
            if is_nearest:
                wrong |= largest > _HALF_STEP + _BEYOND_HALF
            for cell in map(int, np.flatnonzero(wrong)):
                words = f"is {gain[cell]:.2g} times its source, with errors of up to {largest[cell]:.2g} steps"
                self._add(start + row, cell, words)

    def _gain_inside(self) -> float:
        """The gain of some rows, without codes at the end of the grid: what is clipped is too small by choice."""
        signal = cross = 0.0
        for weight, value, _ in self._sampled:
            inside = np.isfinite(value)
            signal += float(np.square(weight[inside], dtype=np.float64).sum())
            cross += float((weight[inside].astype(np.float64) * value[inside]).sum())
        return cross / signal if signal else 1.0

    def _errors(self) -> np.ndarray:
        """The errors of some rows of the whole weight, in steps.

        Steps of FP8 grow with the weight, and calibration makes up for the errors of large weights in small ones, by many of
        their own steps: there no step counts as smaller than the usual one of its row.
        """
        if self._is_integer or self._claim.layout != "plain":
            return np.concatenate([error.reshape(-1) for _, _, error in self._sampled])
        found = []
        for weight, value, error in self._sampled:
            off = np.where(np.isfinite(value), np.abs(value - weight), 0)
            step = np.divide(off, error, out=np.zeros_like(off), where=error > 0)
            least = np.maximum(step, np.median(step, axis=1, keepdims=True))
            found.append(np.divide(off, least, out=np.zeros_like(off), where=least > 0).reshape(-1))
        return np.concatenate(found)

    def _is_nearest(self) -> bool:
        """Whether codes are the nearest ones, so that their scales are their own. Where the source has few values, as one that
        was in FP8 has, equal weights have equal errors, and gains scatter more than chance says."""
        return self._is_integer and float((self._errors() > _HALF_STEP).mean()) < _NOT_NEAREST

    def _tail(self) -> float:
        """The share of codes whose error is far beyond the usual one, and more than a step, over some rows of the whole weight.

        Weights that were in MXFP4 lie on codes or beside them: most errors of calibrated codes are then small ones, and those
        that calibration moved by one stand out.
        """
        if self.size < _TAIL_SIZE:
            return 0.0
        errors = self._errors()
        return float((errors > max(_TAIL * rough_median(errors), _ONE_STEP)).mean())


def _median(values: np.ndarray, known: np.ndarray) -> float:
    """The median of cells that are known, of some of them where there are many."""
    step = max(1, values.size // MEDIAN_CELLS)
    some = values.reshape(-1)[::step][known.reshape(-1)[::step]]
    return float(np.median(some if len(some) else values[known]))

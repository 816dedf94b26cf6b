"""How well does a stored weight stand for its source? Signal to noise in dB, row by row, and what it may be at worst.

SNR = 10 log10(sum w^2 / sum (w - q)^2), w the source, q what readers compute from the codes.

The floors are far below what rounding gives and far above what wrong bytes give. Rounding to nearest on a grid that
has zero never makes an error larger than the weight itself, so no row of it can be under 0 dB; weights of another
tensor or shuffled nibbles give about -3 dB, a lost zero point less. Real weights rounded at 4 bits have 15 to 25 dB
(rows of thousands of inputs under one scale lie at the lower end), at 8 bits 35 to 50 dB, FP8 about 31 dB: 5 dB and
20 dB for a whole tensor leave room for calibrated codes, which trade weight error for output error. Below 4 bits the
floor falls to 0 dB, which only rounding with clipped outliers approaches.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from tensorsurgeon.verifying.cells import CellFacts, CellJudge
from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.weights import CodedWeight, FloatWeight, Weight

FLOOR_DB: Final = {2: 0.0, 3: 2.0, 4: 5.0, 5: 9.0, 6: 13.0, 7: 17.0, 8: 20.0}
# BF16 has 8 significant bits: rounding alone costs about 51 dB.
CAST_FLOOR_DB: Final = 40.0
# -1 dB: out of reach for rounding, with room for rounded scales and calibrated codes; another row's codes give -3 dB.
_ROW_NOISE: Final = 1.25
# A zero point that is one too high, as between the versions of GPTQ, costs 10 dB and shifts all values by one step.
_MOST_SHIFT: Final = 0.5
# In float32 this and its copy stay in the cache, and the allocator keeps the pages.
_CHUNK_ELEMENTS: Final = 1 << 17
# Twice the largest relative and absolute error of rounding to these types.
_PRECISION: Final = {"BF16": (2.0**-7, 1e-38), "F16": (2.0**-10, 2.0**-24), "F32": (2.0**-22, 1e-38)}


class Fidelity(NamedTuple):
    """One weight compared: ``snr_db`` is infinite where every value is the source's. ``bad_rows`` are noisier than
    rounding can make them; ``not_finite`` counts rows with NaN or infinity in what readers compute. ``shift``: by how
    many steps of its grid the weight is too high on average, for asymmetric grids. ``odd_cells``: groups of inputs whose
    scale, zero point or codes are wrong, and in ``complaint`` what is wrong with the first, or with the whole weight."""

    name: str
    num_bits: int
    snr_db: float
    floor_db: float
    bad_rows: int
    first_bad_row: int
    not_finite: int
    shift: float = 0.0
    odd_cells: int = 0
    complaint: str = ""

    @property
    def is_sound(self) -> bool:
        """Whether rounding can explain the error."""
        is_loud = self.snr_db < self.floor_db or self.bad_rows or self.not_finite
        return not (is_loud or self.is_shifted or self.complaint)

    @property
    def is_shifted(self) -> bool:
        """Whether zero points are read wrongly: errors of rounding cancel out, and never add up to half a step."""
        return abs(self.shift) > _MOST_SHIFT


def floor_of(claim: Claim | None) -> float:
    """The least SNR of a weight stored so; None is a float weight."""
    return CAST_FLOOR_DB if claim is None else FLOOR_DB[claim.num_bits]


def compare(name: str, source: Weight, stored: Weight, claim: Claim | None) -> Fidelity:
    """Stream both weights by rows; shapes must be equal."""
    rows, columns = source.shape
    step = max(8, _CHUNK_ELEMENTS // columns // 8 * 8)
    signal_sum = noise_sum = 0.0
    error_sum = step_sum = 0.0
    bad_rows, first_bad, not_finite = 0, -1, 0
    cells = CellJudge(source, stored, claim) if claim is not None and isinstance(stored, CodedWeight) else None
    cast = _Cast(stored) if claim is None else None
    has_zeros = claim is not None and not claim.symmetric
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = source.rows(start, stop)
        # A scale that is infinite or NaN is what this looks for, and no accident.
        with np.errstate(invalid="ignore", over="ignore"):
            noise = stored.rows(start, stop) if cells is None else cells.decoded(start, weight)
            np.subtract(weight, noise, out=noise)
            if has_zeros and isinstance(stored, CodedWeight):
                error_sum -= float(noise.sum(dtype=np.float64))
                step_sum += float(np.abs(stored.scale[start:stop]).sum(dtype=np.float64)) * columns / stored.scale.shape[1]
            signal, error = (_energy(weight), _energy(noise)) if cells is None else cells.take(start, weight, noise)
            if not np.isfinite(error).all():
                signal, error = _energy(weight), _energy(noise)
            if cast is not None:
                cast.take(start, weight, noise)
        finite = np.isfinite(error)
        not_finite += int(np.count_nonzero(~finite))
        wrong = ~finite | (error > _ROW_NOISE * signal)
        if wrong.any():
            if first_bad < 0:
                first_bad = start + int(np.flatnonzero(wrong)[0])
            bad_rows += int(np.count_nonzero(wrong))
        signal_sum += float(signal.sum())
        noise_sum += float(error[finite].sum())
    snr_db = _decibels(signal_sum, noise_sum)
    facts = CellFacts(0, None, "" if cast is None else cast.complaint())
    if cells is not None and not not_finite:
        with np.errstate(invalid="ignore", over="ignore"):
            facts = cells.facts()
    return Fidelity(
        name=name,
        num_bits=16 if claim is None else claim.num_bits,
        snr_db=snr_db,
        floor_db=floor_of(claim),
        bad_rows=bad_rows,
        first_bad_row=first_bad,
        not_finite=not_finite,
        shift=error_sum / step_sum if step_sum and np.isfinite(error_sum) else 0.0,
        odd_cells=facts.odd,
        complaint=facts.describe(),
    )


class _Cast:
    """Rounds once: no element may differ by more than the new type's precision (twice, for tools that scale in it)."""

    def __init__(self, stored: Weight) -> None:
        name = stored.reader.specs[stored.name].dtype.name if isinstance(stored, FloatWeight) else "F32"
        self._relative, self._absolute = _PRECISION.get(name, _PRECISION["F32"])
        self._wrong = 0
        self._first = (0, 0)

    def take(self, start: int, weight: np.ndarray, error: np.ndarray) -> None:
        wrong = np.abs(error) > np.abs(weight) * self._relative + self._absolute
        if wrong.any():
            if not self._wrong:
                row, column = np.argwhere(wrong)[0]
                self._first = start + int(row), int(column)
            self._wrong += int(np.count_nonzero(wrong))

    def complaint(self) -> str:
        if not self._wrong:
            return ""
        more = f", as do {self._wrong - 1} others" if self._wrong > 1 else ""
        return f"element {list(self._first)} differs from the source by more than rounding{more}"


def _energy(values: np.ndarray) -> np.ndarray:
    """Sum of squares by row, [N] in float64; summed in float32, which is twice as fast, unless that overflows."""
    energy: np.ndarray = np.einsum("ij,ij->i", values, values).astype(np.float64)
    if np.isfinite(energy).all():
        return energy
    exact: np.ndarray = np.einsum("ij,ij->i", values, values, dtype=np.float64)
    return exact


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return float("inf")
    return -float("inf") if signal == 0 else 10 * float(np.log10(signal / noise))

"""One row of a quantized weight code by code: how far each is from its source, in steps of the grid.

Rounding to nearest is never further off than half a step, whatever the scale; only codes at the end of the grid may be,
since what to clip is a choice.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.weights import CodedWeight, Weight

_LARGEST_FP8, _LARGEST_FP4 = 448.0, 6.0
_LEAST_STEP: Final = 2.0**-8
# A median of so many is as good as that of all.
MEDIAN_CELLS: Final = 4096


class Steps:
    """Rows of ``stored`` beside those of ``source``, in cells of ``size`` inputs; ``order`` puts inputs of a group together."""

    def __init__(self, source: Weight, stored: CodedWeight, claim: Claim, size: int, order: np.ndarray | None) -> None:
        self._source, self._stored, self._claim, self.size, self._order = source, stored, claim, size, order
        self._is_integer = stored.code_range() is not None
        self._least_step = rough_median(np.abs(stored.scale)) * _LEAST_STEP

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What ``of_rows`` says of one row, [K] each."""
        codes = self._stored.codes(row, row + 1)
        raw = codes.astype(np.float32)
        value = self._stored.decoded(codes, row, row + 1)
        weight, value, error = self.of_rows(np.array([row]), self._source.rows(row, row + 1), raw, value)
        return weight[0], value[0], error[0]

    def of_rows(
        self, rows: np.ndarray, weight: np.ndarray, raw: np.ndarray, value: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32 [rows, K] of the source, the codes and what they mean: the source, what is stored, and the error in steps of
        the grid at each code, where codes at the end of the grid that fall short have none."""
        scale = np.abs(np.concatenate([self._stored.scale_rows(row, row + 1) for row in map(int, rows)]))
        if self._stored.group_of_input is not None:
            wide = scale[:, self._stored.group_of_input]
        else:
            columns = weight.shape[1]
            each = self._claim.block[1] if self._claim.block else -(-columns // scale.shape[1])
            wide = np.repeat(scale, each, axis=1)[:, :columns]
        limits = self._stored.code_range()
        # A group that is next to nothing beside the others may have a scale that its type cannot hold.
        wide = np.maximum(wide, self._least_step)
        if not self._is_integer:
            wide = wide * _spacing(raw, self._claim)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.abs(value - weight) / wide
        if limits is not None:
            at_end = (raw <= limits[0]) | (raw >= limits[1])
        else:
            at_end = np.abs(raw) >= (_LARGEST_FP8 if self._claim.layout == "plain" else _LARGEST_FP4)
        short = at_end & (np.abs(value) <= np.abs(weight))
        error = np.where(short | ~np.isfinite(error), 0.0, error)
        if self._order is not None:
            weight, value, error, short = (part[:, self._order] for part in (weight, value, error, short))
        return weight, np.where(short, np.nan, value), error

    def cells(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[cells] of one row: the largest error in steps, the gain of codes that are not clipped, and its chance."""
        weight, value, error = (part.reshape(-1, self.size) for part in self.row(row))
        inside = np.isfinite(value)
        signal = np.where(inside, weight * weight, 0).sum(axis=1)
        cross = np.where(inside, weight * np.where(inside, value, 0), 0).sum(axis=1)
        noise = np.where(inside, (np.where(inside, value, 0) - weight) ** 2, 0).sum(axis=1)
        count = np.maximum(inside.sum(axis=1), 1)
        safe = np.maximum(signal, 1e-30)
        gain = np.where(signal > 0, cross / safe, 1.0)
        residual = np.maximum(noise - (gain - 1) ** 2 * signal, 0)
        return error.max(axis=1), gain, np.sqrt(residual / safe / count)


def rough_median(values: np.ndarray) -> float:
    """The median of some of them, spread over all: as good as that of all, which takes longer than all else here."""
    flat = values.reshape(-1)
    # An odd step, so that no column is left out: widths are mostly powers of two.
    return float(np.median(flat[:: max(1, flat.size // MEDIAN_CELLS) | 1]))


def _spacing(codes: np.ndarray, claim: Claim) -> np.ndarray:
    """How far apart codes are on a grid of floats."""
    magnitude = np.abs(codes)
    if claim.layout == "plain":
        # E4M3: three bits behind the first, and none below 2 to the -6.
        spacing: np.ndarray = np.exp2(np.floor(np.log2(np.maximum(magnitude, 2.0**-6))) - 3)
        return spacing
    return np.where(magnitude < 2, 0.5, np.where(magnitude < 4, 1.0, 2.0)).astype(np.float32)

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


class Steps:
    """Rows of ``stored`` beside those of ``source``, in cells of ``size`` inputs; ``order`` puts inputs of a group together."""

    def __init__(self, source: Weight, stored: CodedWeight, claim: Claim, size: int, order: np.ndarray | None) -> None:
        self._source, self._stored, self._claim, self.size, self._order = source, stored, claim, size, order
        self._is_integer = stored.code_range() is not None
        self._least_step = float(np.median(np.abs(stored.scale))) * _LEAST_STEP

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[K] each of one row: the source, what is stored, and the error in steps of the grid at each code, where codes at
        the end of the grid that fall short have none."""
        codes = self._stored.codes(row, row + 1)
        weight = self._source.rows(row, row + 1)[0]
        raw = codes[0].astype(np.float32)
        value = self._stored.decoded(codes.astype(np.float32), row, row + 1)[0]
        scale = np.abs(self._stored.scale_rows(row, row + 1))
        if self._stored.group_of_input is not None:
            wide = scale[0, self._stored.group_of_input]
        else:
            each = self._claim.block[1] if self._claim.block else -(-len(weight) // scale.shape[1])
            wide = np.repeat(scale[0], each)[: len(weight)]
        limits = self._stored.code_range()
        # A group that is next to nothing beside the others may have a scale that its type cannot hold.
        wide = np.maximum(wide, self._least_step)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.abs(value - weight) / (wide * _spacing(raw, self._claim, self._is_integer))
        if limits is not None:
            at_end = (raw <= limits[0]) | (raw >= limits[1])
        else:
            at_end = np.abs(raw) >= (_LARGEST_FP8 if self._claim.layout == "plain" else _LARGEST_FP4)
        short = at_end & (np.abs(value) <= np.abs(weight))
        error = np.where(short | ~np.isfinite(error), 0.0, error)
        if self._order is not None:
            return weight[self._order], np.where(short, np.nan, value)[self._order], error[self._order]
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


def _spacing(codes: np.ndarray, claim: Claim, is_integer: bool) -> np.ndarray:
    """How far apart codes are on the grid: 1 for integers, a share of the code for floats."""
    if is_integer:
        return np.ones_like(codes)
    magnitude = np.abs(codes)
    if claim.layout == "plain":
        # E4M3: three bits behind the first, and none below 2 to the -6.
        spacing: np.ndarray = np.exp2(np.floor(np.log2(np.maximum(magnitude, 2.0**-6))) - 3)
        return spacing
    return np.where(magnitude < 2, 0.5, np.where(magnitude < 4, 1.0, 2.0)).astype(np.float32)

"""The level nearest to a number, for grids whose levels are even and for those of narrow floats."""

# mypy: ignore-errors
# The types inside are numba's, decided per call.

from __future__ import annotations

import numpy as np

from tensorsurgeon.quant.loops.bits import bits_of, f32_of
from tensorsurgeon.quant.loops.compiled import inline


@inline
def nearest(value: np.float32, low: np.float32, high: np.float32, fraction: np.float32, least: np.float32) -> np.float32:
    """The level from ``low`` to ``high`` nearest to a float32, ties to the even one; see ``quant.gptq.levels.Spacing``."""
    if fraction == np.float32(0.0):
        return np.float32(min(max(np.rint(value), low), high))
    inside = min(max(value, low), high)
    # The largest power of two that is not above it.
    power = np.float32(f32_of(bits_of(inside) & np.uint32(0x7F800000)))
    step = max(power * fraction, least)
    return np.float32(np.rint(inside / step) * step)

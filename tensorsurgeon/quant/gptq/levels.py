"""Grids of narrow floats, as levels that are counted in units of a scale.

An integer code is the level it stands for. The numbers of a narrow float are levels as well, unevenly spaced: E2M1 in halves is
0, 1, 2, 3, 4, 6, 8, 12 and their negatives, and E4M3 is the multiples of 2^-9 that have four digits. What chooses codes
(``gptq``, ``polish``, ``scale_search``) needs nothing else of a grid than the level nearest to a number.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor


class Spacing(NamedTuple):
    """How far apart levels are: those of size 2^e to 2^(e+1) by ``2^e * fraction``, and no nearer than ``least``.

    ``fraction`` 0: all levels are ``least`` apart, which is 1.
    """

    fraction: float
    least: float


EVEN: Final = Spacing(0.0, 1.0)
"""Integers."""
E2M1: Final = Spacing(0.5, 1.0)
"""E2M1 in halves, up to 12."""
E4M3: Final = Spacing(0.125, 2.0**-9)
"""E4M3, up to 448."""


def nearest_levels(value: Tensor, low: float, high: float, spacing: Spacing) -> Tensor:
    """The level from ``low`` to ``high`` nearest to each number, F32, ties to the even one."""
    if not spacing.fraction:
        return value.round().clamp_(low, high)
    inside = value.clamp(low, high)
    # The mantissa lies in [0.5, 1), so that the largest power of two that is not above a number is half of 2^exponent.
    exponent = torch.frexp(inside)[1]
    step = torch.ldexp(torch.full_like(inside, 0.5 * spacing.fraction), exponent).clamp_(min=spacing.least)
    return (inside / step).round_() * step


def code_dtype(low: float, high: float, spacing: Spacing = EVEN) -> torch.dtype:
    """What holds every level: the smallest of int8 and int16, F32 where levels are no integers."""
    if spacing.least != 1.0:
        return torch.float32
    return torch.int8 if low >= -128 and high <= 127 else torch.int16

"""The ways to compute among which a caller chooses by number, for loops branch on plain numbers; no numba here, for callers.

Each is what a field of ``quant.arithmetic.Arithmetic`` says, and a loop's argument has the field's name.
"""

from __future__ import annotations

from typing import Final

AS_F32: Final = 0
"""``math``, ``stored``, ``quotient``: rounded to F32, which is how everything is computed anyway."""
AS_BF16: Final = 1
"""Rounded once more, to BF16."""
AS_F16: Final = 2
"""Rounded once more, to F16."""
BY_RECIPROCAL: Final = 3
"""``quotient`` only: multiplied by the reciprocal in F32, not rounded further."""

REPLACE_ZERO: Final = 0
"""``zero_group``: a divisor of 0 becomes ``floor``."""
LIFT_TO_FLOOR: Final = 1
"""Every divisor is at least ``floor``."""
UNIT_RANGE: Final = 2
"""A group whose scale would be 0 is taken to span [-1, 1]; ``floor`` is not read."""

ZERO_OF_SPAN: Final = 0
"""``zeros``: the zero point comes from the unrounded scale, and is added before rounding (compressed-tensors)."""
ZERO_CLAMPED: Final = 1
"""Rounded, then clamped to the codes' range (Quark)."""
ZERO_ROUNDED: Final = 2
"""Rounded, and left as it comes."""

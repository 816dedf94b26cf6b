"""gpt-oss's stacks: bytes of two E2M1 codes, the first in the low half, 16 to a group of 32 inputs, and exponents beside them."""

from __future__ import annotations

import numpy as np

from tensorsurgeon.verifying.layouts.fp4 import powers_of_two, values_of

BLOCKS = "_blocks"
"""What the name of such a tensor ends in."""


def expert_of_blocks(blocks: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """float32 [R, 32 G] of one expert, from its bytes [R * G, 16] and exponents [R, G]."""
    rows, groups = exponents.shape
    values = values_of(blocks.reshape(rows * groups, 16))
    values *= powers_of_two(exponents).reshape(-1, 1)
    return values.reshape(rows, groups * 32)

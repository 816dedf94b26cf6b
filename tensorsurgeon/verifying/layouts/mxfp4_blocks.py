"""gpt-oss's stacks: bytes of two E2M1 codes, the first in the low half, 16 to a group of 32 inputs, and exponents beside them."""

from __future__ import annotations

import numpy as np

from tensorsurgeon.verifying.layouts.fp4 import powers_of_two, values_of

BLOCKS, SCALES = "_blocks", "_scales"
"""What the names of such tensors end in."""


def expert_of_blocks(blocks: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """float32 [R, 32 G] of one expert, from its bytes [R * G, 16] and exponents [R, G]."""
    rows, groups = exponents.shape
    values = values_of(blocks.reshape(rows * groups, 16))
    values *= powers_of_two(exponents).reshape(-1, 1)
    return values.reshape(rows, groups * 32)


def largest_of_blocks(blocks: np.ndarray) -> np.ndarray:
    """float32 [R, G], the largest magnitude among the codes of each group, before its exponent; ``blocks`` is [R, G, 16]."""
    rows, groups, _ = blocks.shape
    # Magnitudes of E2M1 grow with their three low bits.
    magnitude = np.maximum(blocks & 7, (blocks >> 4) & 7).max(-1, initial=0)
    values: np.ndarray = values_of(magnitude.reshape(rows * groups, 1))[:, 0].reshape(rows, groups)
    return values

"""Arrays for the cases of op tests: every dtype that ops meet, numbered so that no two elements are alike."""

from __future__ import annotations

from math import prod
from typing import Any

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
# One of each width, and the one that no library but ours reads.
DTYPES = (BF16, F32, FP8, np.dtype(np.int64), np.dtype(np.bool_))


def bits(shape: tuple[int, ...], dtype: Any = BF16, seed: int = 0) -> np.ndarray:
    """Random bits (NaN and all): an op that moves bytes must not look at them."""
    dtype = np.dtype(dtype)
    rng = np.random.default_rng([seed, *shape, dtype.itemsize])
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    raw = rng.integers(0, 256, prod(shape) * dtype.itemsize, np.uint8)
    return raw.view(dtype).reshape(shape)

"""The element types of safetensors files, and their NumPy counterparts.

Bytes travel as NumPy arrays: ``ml_dtypes`` supplies BF16, FP8 and E8M0, so that no torch is needed to move or
quantize a tensor.
"""

from __future__ import annotations

from typing import Final

import ml_dtypes
import numpy as np


class DType:
    """One element type; the module holds the only instance of each, so identity is equality."""

    __slots__ = ("bits", "is_float", "name", "numpy")

    def __init__(self, name: str, bits: int, numpy: np.dtype | None, is_float: bool) -> None:
        self.name: Final = name
        self.bits: Final = bits
        self.numpy: Final = numpy
        self.is_float: Final = is_float

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (dtype_named, (self.name,))

    @property
    def itemsize(self) -> int:
        """Bytes of one element; types narrower than a byte have none of their own."""
        if self.bits % 8:
            raise ValueError(f"{self.name} elements are {self.bits} bits wide and have no size in bytes")
        return self.bits // 8


BF16 = DType("BF16", 16, np.dtype(ml_dtypes.bfloat16), True)
F16 = DType("F16", 16, np.dtype(np.float16), True)
F32 = DType("F32", 32, np.dtype(np.float32), True)
F64 = DType("F64", 64, np.dtype(np.float64), True)
F8_E4M3 = DType("F8_E4M3", 8, np.dtype(ml_dtypes.float8_e4m3fn), True)
F8_E5M2 = DType("F8_E5M2", 8, np.dtype(ml_dtypes.float8_e5m2), True)
F8_E4M3FNUZ = DType("F8_E4M3FNUZ", 8, np.dtype(ml_dtypes.float8_e4m3fnuz), True)
F8_E5M2FNUZ = DType("F8_E5M2FNUZ", 8, np.dtype(ml_dtypes.float8_e5m2fnuz), True)
F8_E8M0 = DType("F8_E8M0", 8, np.dtype(ml_dtypes.float8_e8m0fnu), True)
I8 = DType("I8", 8, np.dtype(np.int8), False)
U8 = DType("U8", 8, np.dtype(np.uint8), False)
I16 = DType("I16", 16, np.dtype(np.int16), False)
U16 = DType("U16", 16, np.dtype(np.uint16), False)
I32 = DType("I32", 32, np.dtype(np.int32), False)
U32 = DType("U32", 32, np.dtype(np.uint32), False)
I64 = DType("I64", 64, np.dtype(np.int64), False)
U64 = DType("U64", 64, np.dtype(np.uint64), False)
BOOL = DType("BOOL", 8, np.dtype(np.bool_), False)
C64 = DType("C64", 64, np.dtype(np.complex64), False)
# Narrower than a byte: such tensors pass through untouched, and no array is ever made of them.
F4 = DType("F4", 4, None, True)
F6_E2M3 = DType("F6_E2M3", 6, None, True)
F6_E3M2 = DType("F6_E3M2", 6, None, True)

_ALL = (
    BF16, F16, F32, F64, F8_E4M3, F8_E5M2, F8_E4M3FNUZ, F8_E5M2FNUZ, F8_E8M0, I8, U8, I16, U16, I32, U32, I64, U64, BOOL, C64,
    F4, F6_E2M3, F6_E3M2,
)  # fmt: skip
DTYPES: Final[dict[str, DType]] = {d.name: d for d in _ALL}
_BY_NUMPY: Final = {d.numpy: d for d in _ALL if d.numpy is not None}
WEIGHT_DTYPES: Final = (BF16, F16, F32)


def dtype_named(name: str) -> DType:
    """The type with this safetensors name; KeyError if there is none."""
    return DTYPES[name]


def dtype_of(array: np.ndarray) -> DType:
    """The safetensors type of an array's elements; KeyError if safetensors has none."""
    return _BY_NUMPY[array.dtype]

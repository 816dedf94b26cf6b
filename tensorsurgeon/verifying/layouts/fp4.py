"""FP4 (E2M1) codes, two to a byte: NVFP4 with scales of scales, MXFP4 with powers of two."""

from __future__ import annotations

from typing import Final

import numpy as np

from tensorsurgeon.tensors.dtypes import F8_E4M3, F8_E8M0, F32, U8
from tensorsurgeon.tensors.spec import TensorSpec
from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.parts import Part
from tensorsurgeon.verifying.weights import CodedWeight

# E2M1: sign, two exponent bits, one mantissa bit.
_E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Both codes of a byte at once, as one element of eight bytes.
_PAIRS: Final = np.stack([np.tile(_E2M1, 16), np.repeat(_E2M1, 16)], axis=1).view(np.float64).reshape(-1)


def values_of(packed: np.ndarray) -> np.ndarray:
    """float32 [N, 2 n] of bytes [N, n]."""
    values: np.ndarray = _PAIRS[packed].view(np.float32)
    return values


def powers_of_two(exponents: np.ndarray) -> np.ndarray:
    """float32, of bytes that are exponents with a bias of 127; 255 is not a number."""
    exponents = exponents.view(np.uint8)
    with np.errstate(over="ignore"):
        powers: np.ndarray = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
    powers[exponents == 255] = np.nan
    return powers


class _Fp4(CodedWeight):
    MAIN = "weight_packed"

    @classmethod
    def shape_of(cls, main: TensorSpec, claim: Claim, stored: tuple[int, int] | None) -> tuple[int, int]:
        """Two codes to a byte."""
        return main.shape[0], main.shape[1] * 2

    def codes(self, start: int, stop: int) -> np.ndarray:
        """float32 values of the codes."""
        return values_of(self.local_rows("weight_packed", start, stop))

    def code_range(self) -> tuple[int, int] | None:
        """A float grid."""
        return None


class Nvfp4(_Fp4):
    """Groups of 16 with E4M3 scales, which ``weight_global_scale`` divides."""

    @classmethod
    def parts(cls, claim: Claim, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Codes, scales, the scale of scales, that of inputs where it was measured."""
        rows, columns = shape
        return (
            Part("weight_packed", (U8,), ((rows, columns // 2),)),
            Part("weight_scale", (F8_E4M3,), ((rows, columns // 16),)),
            Part("weight_global_scale", (F32,), ((1,),)),
            *((Part("input_global_scale", (F32,), ((1,),)),) if claim.static_inputs else ()),
        )

    def read_scale(self) -> np.ndarray:
        """float32 [N, K / 16]."""
        scale = self.array("weight_scale").astype(np.float32)
        scale /= self.array("weight_global_scale")[0]
        return scale


class Mxfp4(_Fp4):
    """Groups of 32 with E8M0 scales: the exponent of a power of two, biased by 127; 255 is not a number."""

    @classmethod
    def parts(cls, claim: Claim, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Codes and exponents."""
        rows, columns = shape
        return (
            Part("weight_packed", (U8,), ((rows, columns // 2),)),
            Part("weight_scale", (U8, F8_E8M0), ((rows, columns // 32),)),
        )

    def read_scale(self) -> np.ndarray:
        """float32 [N, K / 32]."""
        return powers_of_two(self.array("weight_scale"))

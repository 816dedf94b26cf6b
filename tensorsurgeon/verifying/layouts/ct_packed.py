"""compressed-tensors ``pack-quantized``: words along the inputs, codes stored half a range too high."""

from __future__ import annotations

import numpy as np

from tensorsurgeon.tensors.dtypes import I32, I64
from tensorsurgeon.tensors.spec import TensorSpec
from tensorsurgeon.verifying.bits import below, unpack, words_for
from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.parts import FLOATS, Part
from tensorsurgeon.verifying.weights import CodedWeight, groups_of, scale_shapes


class CtPacked(CodedWeight):
    """``weight_packed`` I32 [N, K b / 32], zero points packed along the outputs, the true shape beside them."""

    MAIN = "weight_packed"

    @classmethod
    def shape_of(cls, main: TensorSpec, claim: Claim, stored: tuple[int, int] | None) -> tuple[int, int]:
        """K is known from the words only up to their fill, so ``weight_shape`` decides where it fits."""
        rows, columns = main.shape
        if stored is not None and stored[0] == rows and words_for(stored[1], claim.num_bits) == columns:
            return stored
        return rows, columns * 32 // claim.num_bits

    @classmethod
    def parts(cls, claim: Claim, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Words, scales, zero points of asymmetric codes, shape."""
        rows, columns = shape
        bits = claim.num_bits
        zeros = ((words_for(rows, bits), groups_of(claim, columns)),)
        return (
            Part("weight_packed", (I32,), ((rows, words_for(columns, bits)),)),
            Part("weight_scale", FLOATS, scale_shapes(claim, shape)),
            *(() if claim.symmetric else (Part("weight_zero_point", (I32,), zeros),)),
            Part("weight_shape", (I64, I32), ((2,),)),
        )

    def codes(self, start: int, stop: int) -> np.ndarray:
        """int8."""
        bits = self.claim.num_bits
        return below(unpack(self.local_rows("weight_packed", start, stop), bits, self.shape[1]), 1 << (bits - 1))

    def read_scale(self) -> np.ndarray:
        """float32 [N, G] or [1, 1]."""
        scale = self.array("weight_scale").astype(np.float32)
        if self.claim.group_size == 0:
            return scale.reshape(1, 1)
        return scale.reshape(-1, 1) if scale.ndim < 2 else scale

    def read_zero_point(self) -> np.ndarray | None:
        """float32 [N, G]."""
        if self.claim.symmetric:
            return None
        bits = self.claim.num_bits
        words = self.array("weight_zero_point").T
        return np.ascontiguousarray(below(unpack(words, bits, self.shape[0]), 1 << (bits - 1)).astype(np.float32).T)

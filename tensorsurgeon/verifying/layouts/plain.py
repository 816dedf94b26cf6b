"""One element for each weight: int8 and FP8 of compressed-tensors, Quark and the Hub's own ``fp8``."""

from __future__ import annotations

import numpy as np

from tensorsurgeon.tensors.dtypes import I8, I32, U8
from tensorsurgeon.tensors.spec import TensorSpec
from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.parts import FLOATS, Part
from tensorsurgeon.verifying.weights import CodedWeight, groups_of, scale_shapes


class Plain(CodedWeight):
    """``weight`` [N, K] of the code's own type, and scales in any of the ways they are cut."""

    MAIN = "weight"

    @classmethod
    def shape_of(cls, main: TensorSpec, claim: Claim, stored: tuple[int, int] | None) -> tuple[int, int]:
        """That of ``weight``."""
        return main.shape[0], main.shape[1]

    @classmethod
    def parts(cls, claim: Claim, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Codes, scales, zero points of asymmetric codes, a scale of inputs where it was measured."""
        return (
            Part("weight", (claim.code_dtype,), (shape,)),
            Part(claim.scale_name, FLOATS, scale_shapes(claim, shape)),
            *_zeros(claim, shape[0], groups_of(claim, shape[1])),
            *input_scale(claim, required=True),
        )

    def codes(self, start: int, stop: int) -> np.ndarray:
        """int8, or the float32 values of FP8 codes."""
        codes = self.local_rows("weight", start, stop)
        return codes.astype(np.float32) if self.claim.code_dtype.is_float else codes

    def code_range(self) -> tuple[int, int] | None:
        """-128 to 127; FP8 has a grid of its own."""
        return None if self.claim.code_dtype.is_float else super().code_range()

    def read_scale(self) -> np.ndarray:
        """float32 [N, G], [1, 1], or one for each block."""
        scale = self.array(self.claim.scale_name).astype(np.float32)
        if self.claim.group_size == 0:
            return scale.reshape(1, 1)
        return scale.reshape(-1, 1) if scale.ndim < 2 else scale

    def read_zero_point(self) -> np.ndarray | None:
        """float32 [N, G] of asymmetric codes."""
        if self.claim.symmetric:
            return None
        return self.array("weight_zero_point").astype(np.float32).reshape(self.shape[0], -1)


def input_scale(claim: Claim, *, required: bool) -> tuple[Part, ...]:
    """The scale of static activations."""
    return (Part(claim.input_scale_name, FLOATS, ((1,), ()), required=required),) if claim.static_inputs else ()


def _zeros(claim: Claim, rows: int, groups: int) -> tuple[Part, ...]:
    """Quark's in-memory exporter writes zero points of 0 beside symmetric codes; others write none."""
    integers = (I8, U8, I32)
    if claim.vector_scale and not claim.code_dtype.is_float:
        return (Part("weight_zero_point", integers, ((rows,), ()), required=not claim.symmetric),)
    return () if claim.symmetric else (Part("weight_zero_point", integers, ((rows, groups),)),)

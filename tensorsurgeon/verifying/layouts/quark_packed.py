"""AMD Quark's int4 and uint4: words along the inputs (per channel) or along the outputs of a transposed weight (groups)."""

from __future__ import annotations

import numpy as np

from tensorsurgeon.tensors.dtypes import I32
from tensorsurgeon.tensors.spec import TensorSpec
from tensorsurgeon.verifying.bits import nibbles_across, signed, unpack, words_for
from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.layouts.plain import input_scale
from tensorsurgeon.verifying.parts import FLOATS, Part
from tensorsurgeon.verifying.weights import CodedWeight, groups_of


class QuarkPacked(CodedWeight):
    """``weight`` I32 [N, K / 8], or [K, N / 8] where the claim is ``transposed``; signed codes in two's complement."""

    MAIN = "weight"

    @classmethod
    def shape_of(cls, main: TensorSpec, claim: Claim, stored: tuple[int, int] | None) -> tuple[int, int]:
        """Eight codes to a word, along either axis."""
        rows, columns = main.shape
        return (columns * 8, rows) if claim.transposed else (rows, columns * 8)

    @classmethod
    def parts(cls, claim: Claim, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Words, scales, zero points, a scale of inputs where it was measured."""
        rows, columns = shape
        groups = groups_of(claim, columns)
        needs_zeros = not claim.symmetric
        if not claim.transposed:
            return (
                Part("weight", (I32,), ((rows, words_for(columns, 4)),)),
                Part("weight_scale", FLOATS, ((rows,),)),
                Part("weight_zero_point", (I32,), ((words_for(rows, 4),), (rows,)), required=needs_zeros),
                *input_scale(claim, required=False),
            )
        return (
            Part("weight", (I32,), ((columns, words_for(rows, 4)),)),
            Part("weight_scale", FLOATS, ((groups, rows),)),
            Part("weight_zero_point", (I32,), ((groups, words_for(rows, 4)),), required=needs_zeros),
            *input_scale(claim, required=False),
        )

    def codes(self, start: int, stop: int) -> np.ndarray:
        """int8, or uint8 of uint4."""
        if not self.claim.transposed:
            return self._unpacked(self.local_rows("weight", start, stop), self.shape[1])
        first, last = start // 8, -(-stop // 8)
        codes = nibbles_across(self.whole[:, first:last], interleaved=self.claim.interleaved)
        return self._read(codes[start - first * 8 : stop - first * 8])

    def code_range(self) -> tuple[int, int] | None:
        """0 to 15 or -8 to 7."""
        return (0, 15) if self.claim.unsigned else (-8, 7)

    def read_scale(self) -> np.ndarray:
        """float32 [N, G]; groups are stored as [G, N]."""
        scale = self.array("weight_scale").astype(np.float32)
        return np.ascontiguousarray(scale.T) if self.claim.transposed else scale.reshape(-1, 1)

    def read_zero_point(self) -> np.ndarray | None:
        """float32 [N, G], also of symmetric codes where the file has some."""
        if f"{self.module}.weight_zero_point" not in self.reader.specs:
            return None
        stored = self.array("weight_zero_point")
        rows = self.shape[0]
        if self.claim.transposed:
            return np.ascontiguousarray(self._unpacked(stored, rows).astype(np.float32).T)
        if stored.shape == (rows,) and rows != words_for(rows, 4):
            return stored.astype(np.float32).reshape(-1, 1)
        return np.ascontiguousarray(self._unpacked(stored.reshape(1, -1), rows).astype(np.float32).T)

    def _unpacked(self, words: np.ndarray, count: int) -> np.ndarray:
        return self._read(unpack(words, 4, count, interleaved=self.claim.interleaved))

    def _read(self, codes: np.ndarray) -> np.ndarray:
        return codes if self.claim.unsigned else signed(codes, 4)

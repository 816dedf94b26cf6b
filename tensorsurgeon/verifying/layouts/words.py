"""GPTQ and AWQ: ``qweight``, ``qzeros`` and ``scales`` of a transposed weight, which differ in what a word holds."""

from __future__ import annotations

import numpy as np

from tensorsurgeon.tensors.dtypes import BF16, F16, F32, I32
from tensorsurgeon.tensors.spec import TensorSpec
from tensorsurgeon.verifying.bits import nibbles_across, unpack, words_for
from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.parts import Part
from tensorsurgeon.verifying.weights import CodedWeight, groups_of


class _Words(CodedWeight):
    MAIN = "qweight"

    def code_range(self) -> tuple[int, int] | None:
        """Codes are unsigned and have a zero point."""
        return 0, (1 << self.claim.num_bits) - 1

    def read_scale(self) -> np.ndarray:
        """float32 [N, G], stored as [G, N]."""
        return np.ascontiguousarray(self.array("scales").astype(np.float32).T)

    def read_zero_point(self) -> np.ndarray | None:
        """float32 [N, G]; v1 lets 15 + 1 wrap to 0 in the file, and a reader adds 1 and takes the low bits."""
        bits = self.claim.num_bits
        stored = unpack(self.array("qzeros"), bits, self.shape[0], interleaved=self.claim.interleaved).astype(np.float32)
        return np.ascontiguousarray(((stored + self.claim.zero_offset) % (1 << bits)).T)


def _zeros_and_scales(claim: Claim, shape: tuple[int, int]) -> tuple[Part, Part]:
    rows, groups = shape[0], groups_of(claim, shape[1])
    return (
        Part("qzeros", (I32,), ((groups, words_for(rows, claim.num_bits)),)),
        Part("scales", (F16, BF16, F32), ((groups, rows),)),
    )


class Gptq(_Words):
    """Words along the inputs: ``qweight`` [K b / 32, N]."""

    @classmethod
    def shape_of(cls, main: TensorSpec, claim: Claim, stored: tuple[int, int] | None) -> tuple[int, int]:
        """[N, K] of a transposed weight."""
        return main.shape[1], main.shape[0] * 32 // claim.num_bits

    @classmethod
    def parts(cls, claim: Claim, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Words, zero points, scales, and the group of each input where it may be any."""
        rows, columns = shape
        return (
            Part("qweight", (I32,), ((words_for(columns, claim.num_bits), rows),)),
            *_zeros_and_scales(claim, shape),
            Part("g_idx", (I32,), ((columns,),), required=claim.desc_act),
        )

    def codes(self, start: int, stop: int) -> np.ndarray:
        """uint8."""
        return unpack(self.whole[:, start:stop].T, self.claim.num_bits, self.shape[1])


class Awq(_Words):
    """Words along the outputs: ``qweight`` [K, N / 8]."""

    @classmethod
    def shape_of(cls, main: TensorSpec, claim: Claim, stored: tuple[int, int] | None) -> tuple[int, int]:
        """[N, K] of a transposed weight."""
        return main.shape[1] * 8, main.shape[0]

    @classmethod
    def parts(cls, claim: Claim, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Words, zero points, scales."""
        rows, columns = shape
        return (Part("qweight", (I32,), ((columns, rows // 8),)), *_zeros_and_scales(claim, shape))

    def codes(self, start: int, stop: int) -> np.ndarray:
        """uint8; eight outputs to a word."""
        first, last = start // 8, -(-stop // 8)
        codes = nibbles_across(self.whole[:, first:last], interleaved=self.claim.interleaved)
        return codes[start - first * 8 : stop - first * 8]

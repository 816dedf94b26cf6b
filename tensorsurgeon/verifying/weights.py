"""A weight as float32 rows, whatever it is stored as: what both sides of a comparison are turned into.

Rows are decoded in pieces, so that a comparison holds a few megabytes. Layouts that pack along the outputs of a
transposed weight (GPTQ, AWQ, Quark) are read whole first: a quarter or an eighth of the weight in BF16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.quant import bitpack
from tensorsurgeon.verifying.claims import INTERLEAVED, Claim

# E2M1: sign, two exponent bits, one mantissa bit.
_E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class Weight(Protocol):
    """A matrix [N, K] that can be read by rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, K]."""
        ...


@dataclass(frozen=True, slots=True)
class FloatWeight:
    """Rows ``first`` onwards of a float tensor, of which they may be a part (one expert of a stacked tensor)."""

    reader: TensorReader
    name: str
    shape: tuple[int, int]
    first: int = 0

    def rows(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, K]."""
        return self.reader.rows(self.name, self.first + start, self.first + stop).astype(np.float32)


class CodedWeight:
    """Codes with scales: ``w = (code - zero_point) * scale``.

    Made for tensors whose names, dtypes and shapes were found to be those of the claim.
    """

    def __init__(self, reader: TensorReader, module: str, claim: Claim, shape: tuple[int, int]) -> None:
        self.reader, self.module, self.claim, self.shape = reader, module, claim, shape
        self.scale = _scale(reader, module, claim, shape)
        self.zero_point = _zero_point(reader, module, claim, shape)
        self._whole: np.ndarray | None = None

    def codes(self, start: int, stop: int) -> np.ndarray:
        """[stop - start, K]: integers, or float32 values of FP8 and FP4 codes."""
        claim, name = self.claim, self.module
        columns = self.shape[1]
        match claim.layout:
            case "ct-packed":
                words = self.reader.rows(f"{name}.weight_packed", start, stop)
                return bitpack.unpack_rows(words, claim.num_bits, columns, offset=1 << (claim.num_bits - 1))
            case "nvfp4" | "mxfp4":
                values: np.ndarray = _E2M1[bitpack.unpack_nibbles(self.reader.rows(f"{name}.weight_packed", start, stop))]
                return values
            case "plain":
                codes = self.reader.rows(f"{name}.weight", start, stop)
                return codes.astype(np.float32) if claim.code_dtype.is_float else codes
            case "quark-packed" if not claim.transposed:
                words = self.reader.rows(f"{name}.weight", start, stop)
                return bitpack.unpack_rows(words, 4, columns, order=self._order, signed=not claim.unsigned)
        if self._whole is None:
            self._whole = self.reader.array(f"{name}.{'weight' if claim.layout == 'quark-packed' else 'qweight'}")
        if claim.layout == "gptq":
            words = np.ascontiguousarray(self._whole[:, start:stop])
            return bitpack.unpack_columns(words, claim.num_bits, columns, signed=False)
        # Eight outputs to a word: take whole words, then the outputs asked for.
        first, last = start // 8, -(-stop // 8)
        words = np.ascontiguousarray(self._whole[:, first:last])
        codes = bitpack.unpack_transposed(
            words, 4, (last - first) * 8, order=self._order, signed=claim.layout == "quark-packed" and not claim.unsigned
        )
        return codes[start - first * 8 : stop - first * 8]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, K]: what readers compute."""
        codes = self.codes(start, stop).astype(np.float32)
        claim = self.claim
        if claim.block is not None:
            by_row = self.scale[np.arange(start, stop) // claim.block[0]]
            codes *= np.repeat(by_row, claim.block[1], axis=1)[:, : self.shape[1]]
            return codes
        scale = self.scale if len(self.scale) == 1 else self.scale[start:stop]
        grouped = codes.reshape(stop - start, scale.shape[1], -1)
        if self.zero_point is not None:
            grouped -= self.zero_point[start:stop, :, None]
        grouped *= scale[:, :, None]
        return codes

    @property
    def _order(self) -> tuple[int, ...] | None:
        return INTERLEAVED if self.claim.interleaved else None


def _scale(reader: TensorReader, module: str, claim: Claim, shape: tuple[int, int]) -> np.ndarray:
    """float32 [N, G], [1, 1] per tensor, or one per block."""
    stored = reader.array(f"{module}.{claim.scale_name}")
    if claim.layout == "mxfp4":
        # An E8M0 byte is the exponent of a power of two, biased by 127; 255 is not a number.
        exponents = stored.view(np.uint8)
        powers: np.ndarray = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
        powers[exponents == 255] = np.nan
        return powers
    scale = stored.astype(np.float32)
    if claim.layout == "nvfp4":
        scale /= reader.array(f"{module}.weight_global_scale")[0]
        return scale
    if claim.layout in ("gptq", "awq") or (claim.layout == "quark-packed" and claim.transposed):
        return np.ascontiguousarray(scale.T)
    if claim.group_size == 0:
        return scale.reshape(1, 1)
    return scale.reshape(-1, 1) if scale.ndim < 2 else scale


def _zero_point(reader: TensorReader, module: str, claim: Claim, shape: tuple[int, int]) -> np.ndarray | None:
    """float32 [N, G] in the codes' own range, or None where codes are signed and have none."""
    rows, _ = shape
    bits = claim.num_bits
    if claim.layout == "ct-packed" and not claim.symmetric:
        words = reader.array(f"{module}.weight_zero_point")
        return bitpack.unpack_columns(words, bits, rows, offset=1 << (bits - 1)).astype(np.float32).T
    if claim.layout in ("gptq", "awq"):
        words = reader.array(f"{module}.qzeros")
        order = INTERLEAVED if claim.interleaved else None
        stored = bitpack.unpack_transposed(words, bits, rows, order=order, signed=False).astype(np.float32)
        # v1 lets 15 + 1 wrap to 0 in the file; a reader adds 1 and takes the low bits.
        return (stored + claim.zero_offset) % (1 << bits)
    name = f"{module}.weight_zero_point"
    if claim.layout == "quark-packed" and name in reader.specs:
        return _quark_zero_point(reader.array(name), claim, rows)
    if claim.layout == "plain" and not claim.symmetric:
        return reader.array(name).astype(np.float32).reshape(rows, -1)
    return None


def _quark_zero_point(stored: np.ndarray, claim: Claim, rows: int) -> np.ndarray:
    order = INTERLEAVED if claim.interleaved else None
    if claim.transposed:
        return bitpack.unpack_transposed(stored, 4, rows, order=order, signed=not claim.unsigned).astype(np.float32)
    if stored.shape == (rows,):
        return stored.astype(np.float32).reshape(-1, 1)
    return bitpack.unpack_rows(stored.reshape(1, -1), 4, rows, order=order, signed=not claim.unsigned).astype(np.float32).T

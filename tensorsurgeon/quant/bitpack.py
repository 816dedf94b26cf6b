"""Codes of 2 to 8 bits in 32-bit words, and back: the layouts of all formats, without their names.

Every layout is one dense little-endian bit stream: element i occupies bits [i*b, i*b + b), elements straddle words
where b does not divide 32, and the last word ends in zeros. What differs is the axis along which the stream runs:

=================== ========================= ==========================================================
function            codes -> words            used by
=================== ========================= ==========================================================
``pack_rows``       [R, C] -> [R, C*b/32]     compressed-tensors weights
``pack_columns``    [N, K] -> [K*b/32, N]     GPTQ weights; compressed-tensors zero points (of ``zero.T``)
``pack_transposed`` [N, K] -> [K, N*b/32]     AWQ and Quark weights; GPTQ, AWQ and Quark zero points
=================== ========================= ==========================================================

The value stored is ``(code + offset) mod 2**b``: offset 8 makes signed int4 codes unsigned, 7 makes the zero points
of GPTQ v1 (which stores zero - 1), 0 keeps two's complement. Codes are int8 or uint8 and must fit in b bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from tensorsurgeon.quant.loops.tiles import PACKED_TILE
from tensorsurgeon.tensors.arrays import empty

NATURAL_ORDER: Final = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of an AWQ word (and of Quark's "reorder") holds element ``AWQ_ORDER[i]``."""


def words_per_row(count: int, num_bits: int) -> int:
    """32-bit words that hold ``count`` codes."""
    return -(-count * num_bits // 32)


def pack_rows(codes: np.ndarray, num_bits: int, *, offset: int = 0, order: Sequence[int] | None = None) -> np.ndarray:
    """int8 or uint8 [R, C] -> int32 [R, ceil(C b / 32)], packed along the last axis.

    ``order`` (4 bits only): nibble i of each word holds element ``order[i]`` of its eight; a row that ends inside a
    word has zeros for the missing elements, wherever the order puts them.
    """
    from tensorsurgeon.quant.loops import bitpack as loops

    _check(codes, num_bits, order)
    rows, columns = codes.shape
    codes = _padded(codes, -offset)
    lanes = _flat(codes, np.uint64)
    width = codes.shape[1] // 32 * num_bits
    words = empty((rows, width), np.int32)
    flat = words.reshape(-1).view(np.uint32)
    shift = np.uint64(offset % 256)
    if num_bits == 4:
        loops.pack4(lanes, shift, flat)
    elif num_bits == 8:
        loops.pack8(lanes, shift, flat.view(np.uint64))
    else:
        loops.pack_any(lanes, shift, num_bits, flat)
    if order is not None and tuple(order) != NATURAL_ORDER:
        loops.permute_nibbles(flat, np.array(order, np.int64))
    return _first_columns(words, words_per_row(columns, num_bits))


def unpack_rows(
    words: np.ndarray,
    num_bits: int,
    count: int,
    *,
    offset: int = 0,
    order: Sequence[int] | None = None,
    signed: bool = True,
) -> np.ndarray:
    """int32 [R, W] -> the first ``count`` codes of each row: int8 [R, count], or uint8 where not ``signed``.

    The code is ``stored - offset`` modulo 2**b, taken from the signed range [-2**(b-1), 2**(b-1)) or from
    [0, 2**b): the inverse of ``pack_rows`` for codes of that range.
    """
    from tensorsurgeon.quant.loops import bitpack as loops

    _check(words, num_bits, order, np.int32)
    if words.shape[1] < words_per_row(count, num_bits):
        raise ValueError(f"{count} codes of {num_bits} bits do not fit in {words.shape[1]} words")
    rows, width = words.shape
    blocks = -(-width // num_bits)
    if blocks * num_bits != width:
        ragged, words = words, np.zeros((rows, blocks * num_bits), np.int32)
        words[:, :width] = ragged
    flat = _flat(words, np.uint32)
    if order is not None and tuple(order) != NATURAL_ORDER:
        flat = flat.copy()
        loops.permute_nibbles(flat, np.argsort(np.array(order, np.int64)))
    codes = empty((rows, blocks * 32), np.int8 if signed else np.uint8)
    lanes = codes.reshape(-1).view(np.uint64)
    # A byte needs no extending: its sign bit is the sign already.
    sign = np.uint64(1 << (num_bits - 1) if signed and num_bits < 8 else 0)
    if num_bits == 4:
        loops.unpack4(flat, np.uint64(offset % 256), sign, lanes)
    elif num_bits == 8:
        loops.pack8(_flat(flat, np.uint64), np.uint64(-offset % 256), lanes)
    else:
        loops.unpack_any(flat, np.uint64(offset % 256), num_bits, sign, lanes)
    return _first_columns(codes, count)


def pack_columns(codes: np.ndarray, num_bits: int, *, offset: int = 0) -> np.ndarray:
    """[N, K] -> int32 [ceil(K b / 32), N]: ``pack_rows(codes).T``, made contiguous.

    The transpose moves words, not codes: an eighth of the elements at 4 bits.
    """
    return _transposed(pack_rows(codes, num_bits, offset=offset))


def unpack_columns(words: np.ndarray, num_bits: int, count: int, *, offset: int = 0, signed: bool = True) -> np.ndarray:
    """int32 [W, N] -> int8 or uint8 [N, count]; the inverse of ``pack_columns``."""
    _check(words, num_bits, None, np.int32)
    return unpack_rows(_transposed(words), num_bits, count, offset=offset, signed=signed)


def pack_transposed(codes: np.ndarray, num_bits: int, *, offset: int = 0, order: Sequence[int] | None = None) -> np.ndarray:
    """[N, K] -> int32 [K, ceil(N b / 32)]: ``pack_rows(codes.T)``, without the transpose for whole 4-bit words."""
    from tensorsurgeon.quant.loops import bitpack as loops

    _check(codes, num_bits, order)
    rows, columns = codes.shape
    if num_bits != 4 or rows % 8:
        return pack_rows(_transposed(codes), num_bits, offset=offset, order=order)
    words = empty((columns, rows // 8), np.int32)
    tile = empty(PACKED_TILE, np.uint32)
    slots = np.array(NATURAL_ORDER if order is None else order, np.int64)
    loops.pack4_down(np.ascontiguousarray(codes).view(np.uint8), slots, np.uint8(offset % 256), words.view(np.uint32), tile)
    return words


def unpack_transposed(
    words: np.ndarray,
    num_bits: int,
    count: int,
    *,
    offset: int = 0,
    order: Sequence[int] | None = None,
    signed: bool = True,
) -> np.ndarray:
    """int32 [K, W] -> int8 or uint8 [count, K]; the inverse of ``pack_transposed``."""
    return _transposed(unpack_rows(words, num_bits, count, offset=offset, order=order, signed=signed))


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [R, C] of 4-bit codes -> uint8 [R, C / 2], the first of each two in the low nibble (FP4 layouts).

    C must be even: half a byte belongs to no row.
    """
    if codes.shape[1] % 2:
        raise ValueError(f"{codes.shape[1]} codes of 4 bits do not fill whole bytes")
    columns = codes.shape[1] // 2
    return _first_columns(pack_rows(codes, 4).view(np.uint8), columns)


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [R, C] -> uint8 [R, 2 C] of 4-bit codes; the inverse of ``pack_nibbles``."""
    rows, columns = packed.shape
    words = np.zeros((rows, -(-columns // 4) * 4), np.uint8)
    words[:, :columns] = packed
    return unpack_rows(words.view(np.int32), 4, 2 * columns, signed=False)


def _check(array: np.ndarray, num_bits: int, order: Sequence[int] | None, dtype: Any = None) -> None:
    if array.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {list(array.shape)}")
    if array.dtype not in ((np.int8, np.uint8) if dtype is None else (dtype,)):
        raise ValueError(f"cannot pack or unpack {array.dtype}")
    if not 2 <= num_bits <= 8:
        raise ValueError(f"num_bits must be 2 to 8, got {num_bits}")
    if order is not None and (num_bits != 4 or sorted(order) != list(range(8))):
        raise ValueError(f"order must be a permutation of 0..7 and needs 4 bits, got {order} with {num_bits}")


def _padded(codes: np.ndarray, value: int) -> np.ndarray:
    """``codes`` with columns up to a multiple of 32 that hold ``value``, which the offset turns into zero bits."""
    rows, columns = codes.shape
    if columns % 32 == 0:
        return codes
    padded = np.full((rows, -(-columns // 32) * 32), value % 256, np.uint8)
    padded[:, :columns] = codes.view(np.uint8)
    return padded


def _flat(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The bytes as a vector of ``dtype``; copied only where they are not contiguous and aligned."""
    return np.require(np.ascontiguousarray(array).reshape(-1).view(dtype), requirements="A")


def _first_columns(array: np.ndarray, count: int) -> np.ndarray:
    return array if array.shape[1] == count else np.ascontiguousarray(array[:, :count])


def _transposed(array: np.ndarray) -> np.ndarray:
    from tensorsurgeon.quant.loops import bitpack as loops

    target = empty((array.shape[1], array.shape[0]), array.dtype)
    loops.transpose(np.require(array, requirements=["C", "A"]), target)
    return target

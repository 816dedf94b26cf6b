"""The compiled loops of ``bitpack``: eight codes at a time, as the bytes of one 64-bit word.

Eight codes of b bits fill exactly b bytes, and 32 fill b words, so rows whose length is a multiple of 32 never
share a word and every loop here runs over flat memory. The byte lanes are squeezed together by three
shift-and-mask steps, which the compiler turns into vector code.
"""

from __future__ import annotations

import numpy as np

from tensorsurgeon.quant.loops.compiled import inline, kernel
from tensorsurgeon.quant.loops.tiles import PACKED_TILE

_U8 = np.uint64(8)
_U16 = np.uint64(16)
_U32 = np.uint64(32)
_BYTES = np.uint64(0x0101010101010101)
_HALVES = np.uint64(0x0001000100010001)
_WORDS = np.uint64(0x0000000100000001)
_TOP = np.uint64(0x8080808080808080)
_LOW = np.uint64(0x7F7F7F7F7F7F7F7F)
_ONE = np.uint64(1)
_TILE, _WIDE = PACKED_TILE


@inline
def _add_bytes(x: np.uint64, y: np.uint64) -> np.uint64:
    """Lane-wise sum modulo 256: the top bits are added without carry, so that no lane reaches its neighbour."""
    return ((x & _LOW) + (y & _LOW)) ^ ((x ^ y) & _TOP)


@inline
def _squeeze(x: np.uint64, bits: np.uint64) -> np.uint64:
    """The low ``bits`` of each of eight bytes, side by side from bit 0."""
    two, four = bits + bits, bits << np.uint64(2)
    low = ((_ONE << bits) - _ONE) * _HALVES
    x = (x & low) | ((x >> (_U8 - bits)) & (low << bits))
    low = ((_ONE << two) - _ONE) * _WORDS
    x = (x & low) | ((x >> (_U16 - two)) & (low << two))
    low = (_ONE << four) - _ONE
    return (x & low) | ((x >> (_U32 - four)) & (low << four))


@inline
def _spread(x: np.uint64, bits: np.uint64) -> np.uint64:
    """The inverse of ``_squeeze``: eight fields of ``bits``, one per byte, upper bits clear."""
    two, four = bits + bits, bits << np.uint64(2)
    low = (_ONE << four) - _ONE
    x = (x & low) | ((x & (low << four)) << (_U32 - four))
    low = ((_ONE << two) - _ONE) * _WORDS
    x = (x & low) | ((x & (low << two)) << (_U16 - two))
    low = ((_ONE << bits) - _ONE) * _HALVES
    return (x & low) | ((x & (low << bits)) << (_U8 - bits))


@kernel
def pack4(codes: np.ndarray, offset: np.uint64, words: np.ndarray) -> None:
    """uint64 [n] of eight codes each -> uint32 [n]."""
    offsets = offset * _BYTES
    for i in range(words.size):
        x = _add_bytes(codes[i], offsets) & np.uint64(0x0F0F0F0F0F0F0F0F)
        x = (x | (x >> np.uint64(4))) & np.uint64(0x00FF00FF00FF00FF)
        x = (x | (x >> _U8)) & np.uint64(0x0000FFFF0000FFFF)
        words[i] = np.uint32(x | (x >> _U16))


@kernel
def pack8(codes: np.ndarray, offset: np.uint64, words: np.ndarray) -> None:
    """uint64 [n] -> uint64 [n]: only the offset is added."""
    offsets = offset * _BYTES
    for i in range(words.size):
        words[i] = _add_bytes(codes[i], offsets)


@kernel
def pack_any(codes: np.ndarray, offset: np.uint64, bits: int, words: np.ndarray) -> None:
    """uint64 [4 n] -> uint32 [n bits]: 32 codes to ``bits`` words, for every width from 2 to 7."""
    width = np.uint64(bits)
    offsets = offset * _BYTES
    mask = ((_ONE << width) - _ONE) * _BYTES
    for block in range(words.size // bits):
        word = block * bits
        held = np.uint64(0)
        filled = np.uint64(0)
        for i in range(4):
            x = _squeeze(_add_bytes(codes[4 * block + i], offsets) & mask, width)
            # 8 bits of width 7 are 56, and up to 31 may be held: what does not fit waits for the next word
            low = held | (x << filled)
            count = filled + _U8 * width
            rest = (x >> np.uint64(1)) >> (np.uint64(63) - filled)
            while count >= _U32:
                words[word] = np.uint32(low & np.uint64(0xFFFFFFFF))
                low = (low >> _U32) | (rest << _U32)
                rest = rest >> _U32
                word += 1
                count -= _U32
            held, filled = low, count


@kernel
def unpack4(words: np.ndarray, offset: np.uint64, sign: np.uint64, codes: np.ndarray) -> None:
    """uint32 [n] -> uint64 [n] of eight codes each; ``sign`` is the sign bit to extend, or 0."""
    back = (np.uint64(256) - offset) & np.uint64(0xFF)
    down = ((np.uint64(256) - sign) & np.uint64(0xFF)) * _BYTES
    for i in range(words.size):
        x = np.uint64(words[i])
        x = (x | (x << _U16)) & np.uint64(0x0000FFFF0000FFFF)
        x = (x | (x << _U8)) & np.uint64(0x00FF00FF00FF00FF)
        x = (x | (x << np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        x = _add_bytes(x, back * _BYTES) & np.uint64(0x0F0F0F0F0F0F0F0F)
        codes[i] = _add_bytes(x ^ (sign * _BYTES), down)


@kernel
def unpack_any(words: np.ndarray, offset: np.uint64, bits: int, sign: np.uint64, codes: np.ndarray) -> None:
    """uint32 [n bits] -> uint64 [4 n]; the inverse of ``pack_any``."""
    width = np.uint64(bits)
    mask = ((_ONE << width) - _ONE) * _BYTES
    back = ((np.uint64(256) - offset) & np.uint64(0xFF)) * _BYTES
    down = ((np.uint64(256) - sign) & np.uint64(0xFF)) * _BYTES
    step = _U8 * width
    for block in range(words.size // bits):
        for i in range(4):
            first = np.uint64(i) * step
            word = block * bits + np.int64(first >> np.uint64(5))
            skip = first & np.uint64(31)
            x = np.uint64(words[word]) >> skip
            taken = _U32 - skip
            while taken < step:
                word += 1
                x |= np.uint64(words[word]) << taken
                taken += _U32
            x = _add_bytes(_spread(x, width), back) & mask
            codes[4 * block + i] = _add_bytes(x ^ (sign * _BYTES), down)


@kernel
def permute_nibbles(words: np.ndarray, order: np.ndarray) -> None:
    """In place: nibble i of each word becomes its old nibble ``order[i]``."""
    s0, s1, s2, s3 = (
        np.uint32(4 * order[0]),
        np.uint32(4 * order[1]),
        np.uint32(4 * order[2]),
        np.uint32(4 * order[3]),
    )
    s4, s5, s6, s7 = (
        np.uint32(4 * order[4]),
        np.uint32(4 * order[5]),
        np.uint32(4 * order[6]),
        np.uint32(4 * order[7]),
    )
    nibble = np.uint32(15)
    for i in range(words.size):
        w = words[i]
        low = ((w >> s0) & nibble) | (((w >> s1) & nibble) << np.uint32(4))
        low |= (((w >> s2) & nibble) << np.uint32(8)) | (((w >> s3) & nibble) << np.uint32(12))
        high = ((w >> s4) & nibble) | (((w >> s5) & nibble) << np.uint32(4))
        high |= (((w >> s6) & nibble) << np.uint32(8)) | (((w >> s7) & nibble) << np.uint32(12))
        words[i] = low | (high << np.uint32(16))


@kernel
def transpose(source: np.ndarray, target: np.ndarray) -> None:
    """[R, C] -> [C, R] by tiles of a cache line; ``source`` and ``target`` of one type, both contiguous."""
    rows, columns = source.shape
    for row in range(0, rows, _TILE):
        row_stop = min(row + _TILE, rows)
        for column in range(0, columns, _TILE):
            for c in range(column, min(column + _TILE, columns)):
                for r in range(row, row_stop):
                    target[c, r] = source[r, c]


@kernel
def pack4_down(codes: np.ndarray, order: np.ndarray, offset: np.uint8, words: np.ndarray, tile: np.ndarray) -> None:
    """uint8 [8 n, K] -> uint32 [K, n]: nibble i of word (k, c) is row ``8 c + order[i]`` of column k.

    Sixteen words of 64 columns at a time: reads run along rows, and each write fills a cache line. ``tile``: uint32
    PACKED_TILE to write in.
    """
    columns = codes.shape[1]
    count = words.shape[1]
    for first in range(0, count, _TILE):
        last = min(first + _TILE, count)
        for column in range(0, columns, _WIDE):
            width = min(_WIDE, columns - column)
            for c in range(first, last):
                held = tile[c - first]
                held[:] = np.uint32(0)
                for i in range(8):
                    row = codes[8 * c + order[i], column : column + width]
                    shift = np.uint32(4 * i)
                    for k in range(width):
                        held[k] |= np.uint32(np.uint8(row[k] + offset) & np.uint8(15)) << shift
            for k in range(width):
                for c in range(first, last):
                    words[column + k, c] = tile[c - first, k]

"""Codes out of 32-bit words and bytes: the judge's own reading of every packed layout, in NumPy.

A row of words is one little-endian stream of bits: code i takes the bits from ``i * num_bits`` on, and may begin in
one word and end in the next.
"""

from __future__ import annotations

from typing import Final

import numpy as np

# vLLM and AutoAWQ pack the outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight into the nibbles of a word.
INTERLEAVED: Final = (0, 2, 4, 6, 1, 3, 5, 7)


def words_for(count: int, num_bits: int) -> int:
    """32-bit words that hold ``count`` codes."""
    return -(-count * num_bits // 32)


def unpack(words: np.ndarray, num_bits: int, count: int, *, interleaved: bool = False) -> np.ndarray:
    """int32 [R, W] -> the first ``count`` codes of each row as they are stored: uint8 [R, count], 0 to 2**b - 1.

    ``interleaved`` (4 bits): nibble i of a word holds element ``INTERLEAVED[i]`` of its eight.
    """
    words = np.ascontiguousarray(words)
    if num_bits == 8:
        return words.view(np.uint8)[:, :count]
    if num_bits == 4:
        return (_in_order(words) if interleaved else nibbles(words.view(np.uint8)))[:, :count]
    rows, width = words.shape
    # 32 codes take exactly ``num_bits`` words.
    blocks = -(-width // num_bits)
    padded = np.zeros((rows, blocks * num_bits), np.uint32)
    padded[:, :width] = words.view(np.uint32)
    groups = padded.reshape(rows, blocks, num_bits)
    codes = np.empty((rows, blocks, 32), np.uint8)
    mask = np.uint32((1 << num_bits) - 1)
    for index in range(32):
        word, shift = divmod(index * num_bits, 32)
        value = groups[:, :, word] >> np.uint32(shift)
        if shift + num_bits > 32:
            value |= groups[:, :, word + 1] << np.uint32(32 - shift)
        codes[:, :, index] = value & mask
    return codes.reshape(rows, blocks * 32)[:, :count]


def nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [R, C] -> uint8 [R, 2 C]: the low nibble of each byte, then the high one."""
    # A byte HL as 16 bits, 0HL0 beside it: 0H_L, with the low byte first. Five times as fast as writing every other byte.
    wide = packed.astype(np.dtype("<u2"))
    wide |= wide << np.uint16(4)
    wide &= np.uint16(0x0F0F)
    return wide.view(np.uint8).reshape(packed.shape[0], -1)


def nibbles_across(words: np.ndarray, *, interleaved: bool = False) -> np.ndarray:
    """int32 [K, W] whose words hold eight codes of 4 bits each -> uint8 [8 W, K]: the codes turned round, each row in one run."""
    turned = np.ascontiguousarray(words.T).view(np.uint32)
    codes = np.empty((turned.shape[0], 8, turned.shape[1]), np.uint8)
    shifted = np.empty_like(turned)
    for place, element in enumerate(INTERLEAVED if interleaved else range(8)):
        np.right_shift(turned, np.uint32(4 * place), out=shifted)
        shifted &= np.uint32(15)
        codes[:, element] = shifted
    return codes.reshape(-1, turned.shape[1])


def _in_order(words: np.ndarray) -> np.ndarray:
    rows, width = words.shape
    stored = words.view(np.uint8).reshape(rows, width, 4)
    codes = np.empty((rows, width, 8), np.uint8)
    for place, element in enumerate(INTERLEAVED):
        byte = stored[:, :, place // 2]
        codes[:, :, element] = byte >> 4 if place % 2 else byte & 15
    return codes.reshape(rows, width * 8)


def signed(codes: np.ndarray, num_bits: int) -> np.ndarray:
    """uint8 codes read as two's complement of their width: int8."""
    spare = 8 - num_bits
    # Up to the sign bit of a byte, and down again with the sign.
    result: np.ndarray = np.right_shift(np.left_shift(codes, spare).view(np.int8), spare)
    return result


def below(codes: np.ndarray, offset: int) -> np.ndarray:
    """uint8 codes stored ``offset`` too high: int8."""
    return (codes - np.uint8(offset)).view(np.int8)

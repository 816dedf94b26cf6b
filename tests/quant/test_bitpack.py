"""Packed words against a plain loop over bits, and against the worked words of the formats' own tools."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tensorsurgeon.quant import bitpack
from tensorsurgeon.tensors.arrays import workspace_of_thread

BITS = range(2, 9)


def plain_pack(codes: np.ndarray, num_bits: int, offset: int = 0, order: tuple[int, ...] | None = None) -> np.ndarray:
    """One bit stream per row as a Python integer: nothing shared with the kernels."""
    rows = []
    for row in codes.tolist():
        if order is not None:
            row = row + [-offset] * (-len(row) % 8)
            row = [row[start + slot] for start in range(0, len(row), 8) for slot in order]
        stream = 0
        for position, code in enumerate(row):
            stream |= ((code + offset) % (1 << num_bits)) << (num_bits * position)
        words = -(-codes.shape[1] * num_bits // 32)
        rows.append([(stream >> (32 * word)) & 0xFFFFFFFF for word in range(words)])
    return np.array(rows, np.uint32).reshape(codes.shape[0], -1).view(np.int32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    num_bits = draw(st.integers(2, 8))
    half = 1 << (num_bits - 1)
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 100)))
    codes = draw(arrays.arrays(np.int8, shape, elements=st.integers(-half, half - 1)))
    return codes, num_bits, draw(st.sampled_from([0, half, half - 1, 1]))


@given(cases())
@settings(max_examples=150, deadline=None)
def test_rows_equal_a_plain_loop_and_come_back(case: tuple[np.ndarray, int, int]) -> None:
    codes, num_bits, offset = case
    words = bitpack.pack_rows(codes, num_bits, offset=offset)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(words, plain_pack(codes, num_bits, offset))
    back = bitpack.unpack_rows(words, num_bits, codes.shape[1], offset=offset)
    assert back.dtype == np.int8
    np.testing.assert_array_equal(back, codes)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_columns_and_transposed_are_rows_of_the_transposed_matrix(case: tuple[np.ndarray, int, int]) -> None:
    codes, num_bits, offset = case
    rows, columns = codes.shape
    along_k = bitpack.pack_columns(codes, num_bits, offset=offset)
    np.testing.assert_array_equal(along_k, plain_pack(codes, num_bits, offset).T)
    np.testing.assert_array_equal(bitpack.unpack_columns(along_k, num_bits, columns, offset=offset), codes)
    along_n = bitpack.pack_transposed(codes, num_bits, offset=offset)
    np.testing.assert_array_equal(along_n, plain_pack(codes.T, num_bits, offset))
    np.testing.assert_array_equal(bitpack.unpack_transposed(along_n, num_bits, rows, offset=offset), codes)


@given(st.permutations(range(8)), st.integers(1, 40), st.integers(0, 8), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_any_order_of_nibbles(order: list[int], count: int, offset: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-8, 8, (5, count), np.int8)
    slots = tuple(order)
    words = bitpack.pack_rows(codes, 4, offset=offset, order=slots)
    np.testing.assert_array_equal(words, plain_pack(codes, 4, offset, slots))
    np.testing.assert_array_equal(bitpack.unpack_rows(words, 4, count, offset=offset, order=slots), codes)
    down = bitpack.pack_transposed(codes.T, 4, offset=offset, order=slots)
    np.testing.assert_array_equal(down, words)
    np.testing.assert_array_equal(bitpack.unpack_transposed(down, 4, count, offset=offset, order=slots), codes.T)


@pytest.mark.parametrize("num_bits", BITS)
def test_unsigned_codes_keep_their_range(num_bits: int) -> None:
    codes = np.arange(1 << num_bits, dtype=np.uint8).reshape(1, -1)
    words = bitpack.pack_rows(codes, num_bits)
    np.testing.assert_array_equal(words, plain_pack(codes, num_bits))
    back = bitpack.unpack_rows(words, num_bits, codes.shape[1], signed=False)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("shape", [(48, 96), (33, 130), (160, 160), (8, 256), (136, 72)])
def test_shapes_around_the_tiles_of_the_kernels(num_bits: int, shape: tuple[int, int]) -> None:
    half = 1 << (num_bits - 1)
    codes = np.random.default_rng(num_bits).integers(-half, half, shape, np.int8)
    np.testing.assert_array_equal(bitpack.pack_rows(codes, num_bits), plain_pack(codes, num_bits))
    np.testing.assert_array_equal(bitpack.pack_columns(codes, num_bits), plain_pack(codes, num_bits).T)
    np.testing.assert_array_equal(bitpack.pack_transposed(codes, num_bits), plain_pack(codes.T, num_bits))


def hexadecimal(words: np.ndarray) -> list[str]:
    return [f"{word:08X}" for word in words.view(np.uint32).ravel()]


def test_compressed_tensors_words() -> None:
    int4 = np.arange(-8, 8, dtype=np.int8)[None]
    assert bitpack.pack_rows(int4, 4, offset=8).tolist() == [[1985229328, -19088744]]
    int8 = np.array([[-128, -1, 0, 127, 1, 2, 3, 4]], np.int8)
    assert hexadecimal(bitpack.pack_rows(int8, 8, offset=128)) == ["FF807F00", "84838281"]
    zero_point = np.array([[-8, -3, 0, 7, 1, 2, 3, 4]], np.int8).T  # [N, G]
    words = bitpack.pack_columns(zero_point.T, 4, offset=8)
    assert words.shape == (1, 1)
    assert hexadecimal(words) == ["CBA9F850"]


def test_gptq_words() -> None:
    codes = np.arange(8, dtype=np.int8)[None] - 8  # unsigned 0..7, kept signed inside
    assert hexadecimal(bitpack.pack_columns(codes, 4, offset=8)) == ["76543210"]
    middle = np.zeros((8, 1), np.int8)  # zero point 8, signed 0
    assert bitpack.pack_transposed(middle, 4, offset=7).tolist() == [[2004318071]]
    assert bitpack.pack_transposed(middle, 4, offset=8).tolist() == [[-2004318072]]
    assert bitpack.pack_transposed(middle[:4], 8, offset=127).tolist() == [[2139062143]]
    assert bitpack.pack_transposed(middle[:4], 8, offset=128).tolist() == [[-2139062144]]


def test_gptq_three_bits_spill_as_autogptq_writes_them() -> None:
    """AutoGPTQ fills 10 codes, splits one over the words, 10 codes, splits one, 10 codes."""
    values = np.random.default_rng(3).integers(0, 8, 32).tolist()
    words = [0, 0, 0]
    for i in range(10):
        words[0] |= values[i] << (3 * i)
        words[1] |= values[11 + i] << (3 * i + 1)
        words[2] |= values[22 + i] << (3 * i + 2)
    words[0] |= values[10] << 30
    words[1] |= (values[10] >> 2) & 1 | values[21] << 31
    words[2] |= (values[21] >> 1) & 3
    packed = bitpack.pack_columns(np.array([values], np.uint8), 3)
    assert packed.view(np.uint32).ravel().tolist() == [word & 0xFFFFFFFF for word in words]


def test_awq_and_quark_words() -> None:
    codes = np.arange(8, dtype=np.int8)[:, None]  # [N, K = 1]
    assert hexadecimal(bitpack.pack_transposed(codes, 4, order=bitpack.AWQ_ORDER)) == ["75316420"]
    assert hexadecimal(bitpack.pack_transposed(codes, 4)) == ["76543210"]
    assert hexadecimal(bitpack.pack_transposed(codes - 8, 4)) == ["FEDCBA98"]  # Quark int4: two's complement


def test_fp4_bytes() -> None:
    codes = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 0]], np.uint8)
    packed = bitpack.pack_nibbles(codes)
    assert packed.dtype == np.uint8
    assert packed.tobytes().hex(" ") == "10 32 54 76 a9 cb ed 0f"
    np.testing.assert_array_equal(bitpack.unpack_nibbles(packed), codes)
    np.testing.assert_array_equal(bitpack.unpack_nibbles(packed[:, :3]), codes[:, :6])


def test_views_and_unaligned_arrays_are_taken_as_they_are() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (64, 64), np.int8)
    np.testing.assert_array_equal(bitpack.pack_rows(codes[::2, ::-1], 4), plain_pack(codes[::2, ::-1], 4))
    raw = np.empty(64 * 64 + 1, np.int8)
    shifted = raw[1:].reshape(64, 64)
    shifted[:] = codes
    np.testing.assert_array_equal(bitpack.pack_rows(shifted, 4), plain_pack(codes, 4))
    words = plain_pack(codes, 4)
    unaligned = np.frombuffer(b"." + words.tobytes(), np.uint8)[1:].view(np.int32).reshape(words.shape)
    assert not unaligned.flags.aligned
    np.testing.assert_array_equal(bitpack.unpack_rows(unaligned, 4, 64), codes)
    np.testing.assert_array_equal(bitpack.unpack_columns(unaligned, 4, 512)[:, :8], bitpack.unpack_rows(
        np.ascontiguousarray(words.T), 4, 8))  # fmt: skip


def test_a_used_workspace_leaves_nothing_behind() -> None:
    codes = np.random.default_rng(1).integers(-4, 4, (7, 45), np.int8)
    with workspace_of_thread() as workspace:
        workspace.empty((7, 45), np.dtype(np.int8)).fill(-1)
        workspace.reset()
        words = bitpack.pack_rows(codes, 3, offset=4).copy()
        workspace.reset()
        np.testing.assert_array_equal(bitpack.unpack_rows(words, 3, 45, offset=4), codes)
    np.testing.assert_array_equal(words, plain_pack(codes, 3, 4))


def test_wrong_arguments_are_refused() -> None:
    codes = np.zeros((2, 8), np.int8)
    with pytest.raises(ValueError, match="num_bits must be 2 to 8, got 9"):
        bitpack.pack_rows(codes, 9)
    with pytest.raises(ValueError, match="permutation"):
        bitpack.pack_rows(codes, 4, order=(0, 0, 1, 2, 3, 4, 5, 6))
    with pytest.raises(ValueError, match="needs 4 bits"):
        bitpack.pack_rows(codes, 8, order=bitpack.AWQ_ORDER)
    with pytest.raises(ValueError, match="float32"):
        bitpack.pack_rows(codes.astype(np.float32), 4)
    with pytest.raises(ValueError, match="expected a matrix"):
        bitpack.pack_rows(codes[0], 4)
    with pytest.raises(ValueError, match="9 codes of 4 bits do not fit in 1 words"):
        bitpack.unpack_rows(np.zeros((2, 1), np.int32), 4, 9)
    with pytest.raises(ValueError, match="whole bytes"):
        bitpack.pack_nibbles(codes[:, :7].view(np.uint8))

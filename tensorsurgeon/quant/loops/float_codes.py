"""The compiled loops of the fast backend for FP8 and FP4; see ``integer_codes`` for the integers."""

# mypy: ignore-errors
# The types in here are numba's, decided per call; the kernels' own signatures are written out for their callers.

from __future__ import annotations

import numpy as np

from tensorsurgeon.quant.loops.bits import bits_of, f32_of, infinity, like, to_bf16, to_f16_digits, widen
from tensorsurgeon.quant.loops.choices import AS_BF16, AS_F16
from tensorsurgeon.quant.loops.compiled import inline, kernel
from tensorsurgeon.quant.loops.integer_codes import round_to, run_amax

_SIXTEEN = np.uint64(16)


@inline
def e4m3_of(value):
    """The E4M3 byte nearest to a number of magnitude at most 448, half-even."""
    sign = bits_of(value) & np.uint32(0x80000000)
    bits = bits_of(value) ^ sign
    # 20 mantissa bits go, and the exponent's bias falls from 127 to 7
    normal = (bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1)) - np.uint32(0x3C000000)) >> np.uint32(20)
    # Numbers in [2**14, 2**15) are 2**-9 apart, as E4M3 subnormals are.
    small = bits_of(f32_of(bits) + np.float32(16384.0)) & np.uint32(0xFF)
    code = small if bits < np.uint32(0x3C800000) else normal
    return np.uint8(code | (sign >> np.uint32(24)))


@inline
def e4m3_value(byte):
    """The float32 of a non-negative E4M3 byte: its bits in their F32 places are 2**120 too small."""
    return f32_of(np.uint32(byte) << np.uint32(20)) * np.float32(2.0**120)


@inline
def e2m1_of(value):
    """The E2M1 code nearest to a number, ties to the even code, saturating at 6."""
    size = abs(value)
    code = np.uint8(size > np.float32(0.25)) + np.uint8(size >= np.float32(0.75)) + np.uint8(size > np.float32(1.25))
    code += np.uint8(size >= np.float32(1.75)) + np.uint8(size > np.float32(2.5))
    code += np.uint8(size >= np.float32(3.5)) + np.uint8(size > np.float32(5.0))
    return np.uint8(code | (np.uint8(value < np.float32(0.0)) << np.uint8(3)))


@kernel
def weight_amax(weight: np.ndarray) -> float:
    """The largest magnitude of a matrix; infinity if a number is not finite."""
    largest = like(weight[0, 0], 0)
    for n in range(weight.shape[0]):
        largest = max(largest, run_amax(weight[n], np.uint64(0), weight.shape[1]))
    return widen(largest) if largest < infinity(largest) else np.float32(np.inf)


@inline
def e4m3_codes(row, first, size, divisor, quotient, made):
    """E4M3 bytes of a run of a row."""
    start = np.uint64(first)
    for k in range(np.uint64(size)):
        q = widen(row[start + k]) / divisor
        if quotient == AS_BF16:
            q = to_bf16(q)
        elif quotient == AS_F16:
            q = to_f16_digits(q)
        made[start + k] = e4m3_of(min(max(q, np.float32(-448.0)), np.float32(448.0)))


@kernel
def fp8(
    weight: np.ndarray,
    height: int,
    width: int,
    math: int,
    stored: int,
    quotient: int,
    floor: np.float32,
    codes: np.ndarray,
    scale: np.ndarray,
) -> int:
    """E4M3 bytes [N, K] and scales float32 of blocks; -1, or the first row of blocks that is not finite."""
    rows, columns = weight.shape
    for i in range(scale.shape[0]):
        top, bottom = i * height, min((i + 1) * height, rows)
        for j in range(scale.shape[1]):
            left, right = j * width, min((j + 1) * width, columns)
            largest = like(weight[0, 0], 0)
            for n in range(top, bottom):
                largest = max(largest, run_amax(weight[n], np.uint64(left), right - left))
            if not largest < infinity(largest):
                return i
            divisor = round_to(round_to(widen(largest) / np.float32(448.0), math), stored)
            divisor = floor if divisor == 0 else divisor
            scale[i, j] = divisor
            for n in range(top, bottom):
                e4m3_codes(weight[n], left, right - left, divisor, quotient, codes[n])
    return -1


@inline
def e2m1_codes(row, first, size, divisor, made):
    """E2M1 codes of one group, in blocks of known length."""
    start = np.uint64(first)
    for _ in range(size // 16):
        for k in range(_SIXTEEN):
            made[start + k] = e2m1_of(widen(row[start + k]) / divisor)
        start += _SIXTEEN
    for k in range(np.uint64(size % 16)):
        made[start + k] = e2m1_of(widen(row[start + k]) / divisor)


@kernel
def nvfp4(
    weight: np.ndarray,
    size: int,
    math: int,
    multiplier: np.float32,
    least: np.float32,
    codes: np.ndarray,
    scale: np.ndarray,
) -> None:
    """E2M1 codes uint8 [N, K] and E4M3 scales (as float32) [N, G] under one multiplier.

    ``least`` replaces a scale of 0. The weight is finite: ``weight_amax`` has been there.
    """
    for n in range(weight.shape[0]):
        row, made = weight[n], codes[n]
        for g in range(scale.shape[1]):
            first = g * size
            amax = widen(run_amax(row, np.uint64(first), size))
            local = min(multiplier * round_to(amax / np.float32(6.0), math), np.float32(448.0))
            local = e4m3_value(e4m3_of(local))
            local = least if local == 0 else local
            scale[n, g] = local
            e2m1_codes(row, first, size, local / multiplier, made)


@kernel
def mxfp4(weight: np.ndarray, size: int, codes: np.ndarray, scale: np.ndarray) -> int:
    """E2M1 codes uint8 [N, K] and powers of two (as float32) [N, G]; -1, or the first row that is not finite."""
    for n in range(weight.shape[0]):
        row, made = weight[n], codes[n]
        for g in range(scale.shape[1]):
            first = g * size
            largest = run_amax(row, np.uint64(first), size)
            if not largest < infinity(largest):
                return n
            raised = (bits_of(widen(largest)) + np.uint32(1 << 21)) >> np.uint32(23)
            exponent = raised - np.uint32(2) if raised > np.uint32(2) else np.uint32(0)
            scale[n, g] = f32_of(np.uint32(1 << 22) if exponent == 0 else exponent << np.uint32(23))
            e2m1_codes(row, first, size, scale[n, g], made)
    return -1

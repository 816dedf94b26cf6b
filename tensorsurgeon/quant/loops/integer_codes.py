"""The compiled loops of the fast backend: integer codes of rows of weights.

Weights come as bits (``bits.py``). Magnitudes are compared as integers, which vectorises and finds infinities and
NaNs on the way; values are divided and rounded exactly as torch does: with a true division where the tool divides,
and one more rounding where the tool computes in 16 bits. A row is read twice, the second time from the cache.
"""

# mypy: ignore-errors
# The types in here are numba's, decided per call; the kernels' own signatures are written out for their callers.

from __future__ import annotations

import numpy as np

from tensorsurgeon.quant.loops.bits import infinity, like, magnitude, ordered, to_bf16, to_f16, to_f16_digits, widen
from tensorsurgeon.quant.loops.choices import (
    AS_BF16,
    AS_F16,
    AS_F32,
    BY_RECIPROCAL,
    LIFT_TO_FLOOR,
    REPLACE_ZERO,
    UNIT_RANGE,
    ZERO_CLAMPED,
    ZERO_OF_SPAN,
)
from tensorsurgeon.quant.loops.compiled import inline, kernel

_EIGHT = np.uint64(8)
_LONG = 128
_BLOCK = np.uint64(32)


@inline
def round_to(value, precision):
    """Rounded to the precision in which a tool keeps an intermediate."""
    if precision == AS_BF16:
        return to_bf16(value)
    if precision == AS_F16:
        return to_f16(value)
    return value


@inline
def run_amax(row, start, size):
    """The largest magnitude, as bits, of ``size`` elements from ``start`` (unsigned).

    Blocks of known length for short groups: their vector loop would be over before it begins. Indices are unsigned
    because a signed one might count from the end, which keeps a loop scalar.
    """
    largest = like(row[0], 0)
    if size < _LONG and size % 8 == 0:
        for _ in range(size // 8):
            for k in range(_EIGHT):
                largest = max(largest, magnitude(row[start + k]))
            start += _EIGHT
        return largest
    for k in range(np.uint64(size)):
        largest = max(largest, magnitude(row[start + k]))
    return largest


@inline
def group_amax(row, groups, size, amax):
    """The largest magnitude of each group of a row; False if the row holds an infinity or a NaN."""
    finite = True
    for g in range(groups):
        largest = run_amax(row, np.uint64(g * size), size)
        finite &= largest < infinity(largest)
        amax[g] = widen(largest)
    return finite


@inline
def group_range(row, groups, size, low, high):
    """Minimum and maximum of each group, widened to hold 0; False if the row holds an infinity or a NaN."""
    limit = infinity(row[0])
    finite = True
    for g in range(groups):
        least = ordered(like(row[0], 0))
        most = ordered(like(row[0], 0))
        largest = like(row[0], 0)
        start = np.uint64(g * size)
        for k in range(np.uint64(size)):
            value = ordered(row[start + k])
            least = min(least, value)
            most = max(most, value)
            largest = max(largest, magnitude(row[start + k]))
        finite &= largest < limit
        low[g] = widen(like(row[0], ordered(like(row[0], least))))
        high[g] = widen(like(row[0], most))
    return finite


@inline
def settle_scales(span, steps, unit, math, stored, zero_group, floor, rounds_late, scale, divisor):
    """Scale on disk and divisor of each group from its span: ``span / steps`` and the tool's care of zeros.

    ``unit`` is the span of [-1, 1], as this kind of scheme measures it.
    """
    if zero_group == UNIT_RANGE:
        for g in range(span.size):
            span[g] = unit if span[g] / steps == 0 else span[g]
    for g in range(span.size):
        value = round_to(span[g] / steps, math)
        divisor[g] = value if rounds_late else round_to(value, stored)
    if zero_group == REPLACE_ZERO:
        for g in range(span.size):
            divisor[g] = floor if divisor[g] == 0 else divisor[g]
    elif zero_group == LIFT_TO_FLOOR:
        for g in range(span.size):
            divisor[g] = max(divisor[g], floor)
    for g in range(span.size):
        scale[g] = round_to(divisor[g], stored)


@inline
def code_of(value, divisor, factor, low, high, quotient):
    """One code: quotient, clamp, round half-even."""
    if quotient == BY_RECIPROCAL:
        q = value * factor
    elif quotient == AS_BF16:
        q = to_bf16(value / divisor)
    elif quotient == AS_F16:
        q = to_f16_digits(value / divisor)
    else:
        q = value / divisor
    return np.int8(np.int32(np.rint(min(max(q, low), high))))


@inline
def block_codes(row, start, blocks, by, low, high, quotient, codes):
    """Codes of blocks of 32: with ``quotient`` known where it is inlined, each block is straight vector code."""
    for _ in range(blocks):
        for k in range(_BLOCK):
            codes[start + k] = code_of(widen(row[start + k]), by, by, low, high, quotient)
        start += _BLOCK


@inline
def group_codes(row, first, size, divisor, low, high, quotient, codes):
    """Codes of the group that begins at ``first``; see ``run_amax`` for its manner of indexing."""
    start, blocks = np.uint64(first), size // 32
    factor = np.float32(1.0) / divisor
    if quotient == AS_F32:
        block_codes(row, start, blocks, divisor, low, high, AS_F32, codes)
    elif quotient == AS_BF16:
        block_codes(row, start, blocks, divisor, low, high, AS_BF16, codes)
    elif quotient == AS_F16:
        block_codes(row, start, blocks, divisor, low, high, AS_F16, codes)
    else:
        block_codes(row, start, blocks, factor, low, high, BY_RECIPROCAL, codes)
    start += np.uint64(blocks) * _BLOCK
    for k in range(np.uint64(size - 32 * blocks)):
        codes[start + k] = code_of(widen(row[start + k]), divisor, factor, low, high, quotient)


@inline
def zero_of(least, span, divisor, low, high, math, quotient, zeros):
    """The zero point of one group, as the tool counts."""
    if zeros == ZERO_OF_SPAN:
        # compressed-tensors takes it before a zero scale is replaced: a minimum over 0 is clamped, and 0 / 0 becomes
        # 0 in the cast to int8
        scale = round_to(span / (high - low), math)
        if scale == 0:
            return high if least < 0 else np.float32(0.0)
        steps = round_to(least / scale, math)
        return np.rint(min(max(round_to(low - steps, math), low), high))
    if zeros == ZERO_CLAMPED:
        return min(max(low - np.rint(round_to(least / divisor, math)), low), high)
    return np.rint(round_to(-least / divisor, quotient))


@inline
def shifted_codes(row, first, size, divisor, zero, low, high, quotient, zeros, shift, codes):
    """Codes of one group with a zero point, less ``shift``."""
    start = np.uint64(first)
    factor = np.float32(1.0) / divisor
    if zeros == ZERO_OF_SPAN:
        for k in range(np.uint64(size)):
            q = widen(row[start + k]) / divisor
            # the sum is rounded like every intermediate, and only then to an integer
            if quotient == AS_BF16:
                q = to_bf16(to_bf16(q) + zero)
            elif quotient == AS_F16:
                q = to_f16_digits(to_f16_digits(q) + zero)
            else:
                q = q + zero
            codes[start + k] = np.int8(np.int32(np.rint(min(max(q, low), high))) - shift)
        return
    for k in range(np.uint64(size)):
        value = widen(row[start + k])
        if quotient == BY_RECIPROCAL:
            q = value * factor
        elif quotient == AS_F16:
            q = to_f16_digits(value / divisor)
        else:
            q = value / divisor
        codes[start + k] = np.int8(np.int32(min(max(np.rint(q) + zero, low), high)) - shift)


@kernel
def symmetric(
    weight: np.ndarray,
    size: int,
    low: np.float32,
    high: np.float32,
    steps: np.float32,
    math: int,
    stored: int,
    quotient: int,
    zero_group: int,
    floor: np.float32,
    rounds_late: bool,
    signed: bool,
    codes: np.ndarray,
    scale: np.ndarray,
    scratch: np.ndarray,
) -> int:
    """Codes int8 [N, K] and scales float32 [N, G] of weight bits [N, K]; -1, or the first row that is not finite.

    ``signed`` is the full range (``Scheme.signed``): the scale is negative unless the minimum of the group leads.
    ``scratch``: float32 [3, G].
    """
    rows, columns = weight.shape
    groups = columns // size
    span, lows, divisor = scratch[0], scratch[1], scratch[2]
    for n in range(rows):
        row, made, scales = weight[n], codes[n], scale[n]
        if signed:
            finite = group_range(row, groups, size, lows, span)
            for g in range(groups):
                lead = -lows[g]
                lows[g] = np.float32(1.0) if span[g] < lead else np.float32(-1.0)
                span[g] = max(span[g], lead)
        else:
            finite = group_amax(row, groups, size, span)
        if not finite:
            return n
        settle_scales(span, steps, np.float32(1.0), math, stored, zero_group, floor, rounds_late, scales, divisor)
        if signed:
            for g in range(groups):
                # a scale that the dtype rounds to 0 has lost its sign, and is lifted to the positive floor
                sign = np.float32(1.0) if round_to(round_to(span[g] / steps, math), stored) == 0 else lows[g]
                divisor[g] *= sign
                scales[g] *= sign
        for g in range(groups):
            group_codes(row, g * size, size, divisor[g], low, high, quotient, made)
    return -1


@kernel
def asymmetric(
    weight: np.ndarray,
    size: int,
    low: np.float32,
    high: np.float32,
    math: int,
    stored: int,
    quotient: int,
    zero_group: int,
    floor: np.float32,
    rounds_late: bool,
    zeros: int,
    shift: int,
    codes: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    scratch: np.ndarray,
) -> int:
    """Codes, scales and zero points int8 [N, G]; -1, or the first row that is not finite.

    ``low`` and ``high`` bound the codes as the tool counts them, and ``shift`` makes them signed. ``zeros`` is the way
    to the zero point. ``scratch``: float32 [5, G].
    """
    rows, columns = weight.shape
    groups = columns // size
    least, most, span, divisor, zero = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    for n in range(rows):
        row, made, scales, zero_points = weight[n], codes[n], scale[n], zero_point[n]
        if not group_range(row, groups, size, least, most):
            return n
        for g in range(groups):
            span[g] = round_to(most[g] - least[g], math)
            if zero_group == UNIT_RANGE and span[g] / (high - low) == 0:
                least[g] = np.float32(-1.0)
        settle_scales(span, high - low, np.float32(2.0), math, stored, zero_group, floor, rounds_late, scales, divisor)
        for g in range(groups):
            zero[g] = zero_of(least[g], span[g], divisor[g], low, high, math, quotient, zeros)
            zero_points[g] = np.int8(np.int32(zero[g]) - shift)
        for g in range(groups):
            shifted_codes(row, g * size, size, divisor[g], zero[g], low, high, quotient, zeros, shift, made)
    return -1

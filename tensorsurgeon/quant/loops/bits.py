"""Floats as bits, inside compiled loops: widening, comparing and rounding without a library call.

The array type says the dtype: uint16 is BF16, int16 is F16, uint32 is F32.
"""

# mypy: ignore-errors
# The types in here are numba's, decided per call; the kernels' own signatures are written out for their callers.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from tensorsurgeon.quant.loops.compiled import inline


def _same_bits(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))


@intrinsic
def f32_of(_context: Any, bits: Any) -> tuple[Any, Callable[..., Any]]:
    """The float32 with these bits (uint32)."""
    return types.float32(types.uint32), _same_bits


@intrinsic
def bits_of(_context: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """The bits (uint32) of a float32."""
    return types.uint32(types.float32), _same_bits


def widen(bits: Any) -> Any:
    """The float32 of one element; exact for all finite values."""
    raise NotImplementedError("only inside compiled code")


@overload(widen, strict=False)
def _widen(bits: Any) -> Callable[..., Any]:
    if bits == types.uint16:
        return lambda bits: f32_of(np.uint32(bits) << np.uint32(16))
    if bits == types.int16:
        return _widen_f16
    return lambda bits: f32_of(bits)


def _widen_f16(bits: Any) -> Any:
    half = np.uint32(np.uint16(bits))
    # Exponent and mantissa in their F32 places are 2**112 too small, subnormals included.
    size = f32_of((half & np.uint32(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
    return f32_of(bits_of(size) | ((half & np.uint32(0x8000)) << np.uint32(16)))


def magnitude(bits: Any) -> Any:
    """Bits without the sign: ordered as the magnitudes are."""
    raise NotImplementedError("only inside compiled code")


@overload(magnitude, strict=False)
def _magnitude(bits: Any) -> Callable[..., Any]:
    if bits == types.uint16:
        return lambda bits: np.uint16(bits & np.uint16(0x7FFF))
    if bits == types.int16:
        return lambda bits: np.int16(bits & np.int16(0x7FFF))
    return lambda bits: np.uint32(bits & np.uint32(0x7FFFFFFF))


def infinity(bits: Any) -> Any:
    """The least magnitude that is not finite, in the type of ``bits``."""
    raise NotImplementedError("only inside compiled code")


@overload(infinity, strict=False)
def _infinity(bits: Any) -> Callable[..., Any]:
    if bits == types.uint16:
        return lambda bits: np.uint16(0x7F80)
    if bits == types.int16:
        return lambda bits: np.int16(0x7C00)
    return lambda bits: np.uint32(0x7F800000)


def ordered(bits: Any) -> Any:
    """A signed integer ordered as the values are, and its own inverse: negative numbers count down from -1."""
    raise NotImplementedError("only inside compiled code")


@overload(ordered, strict=False)
def _ordered(bits: Any) -> Callable[..., Any]:
    if bits == types.uint32:
        return lambda bits: np.int32(bits) ^ ((np.int32(bits) >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return lambda bits: np.int16(np.int16(bits) ^ ((np.int16(bits) >> np.int16(15)) & np.int16(0x7FFF)))


def like(bits: Any, value: Any) -> Any:
    """``value`` cast to the type of ``bits``."""
    raise NotImplementedError("only inside compiled code")


@overload(like, strict=False)
def _like(bits: Any, value: Any) -> Callable[..., Any]:
    if bits == types.uint16:
        return lambda bits, value: np.uint16(value)
    if bits == types.int16:
        return lambda bits, value: np.int16(value)
    return lambda bits, value: np.uint32(value)


@inline
def to_bf16(value: np.float32) -> np.float32:
    """Rounded half-even to the nearest BF16."""
    bits = bits_of(value)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return f32_of(bits & np.uint32(0xFFFF0000))


@inline
def to_f16(value: np.float32) -> np.float32:
    """Rounded half-even to the nearest F16: subnormals kept, infinity above 65504."""
    sign = bits_of(value) & np.uint32(0x80000000)
    bits = bits_of(value) ^ sign
    normal = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    # 65520 and above round to 65536, which F16 does not have.
    normal = np.uint32(0x7F800000) if normal >= np.uint32(0x47800000) else normal
    # Numbers in [0.5, 1) are 2**-24 apart, as F16 subnormals are.
    small = bits_of(f32_of(bits) + np.float32(0.5) - np.float32(0.5))
    return f32_of(sign | (small if bits < np.uint32(0x38800000) else normal))


@inline
def to_f16_digits(value: np.float32) -> np.float32:
    """Rounded half-even to the 11 significant bits of F16, whatever the exponent.

    Enough for a quotient on its way to a code: what F16 would overflow is clamped, and its subnormals are far below
    the first tie. Faster than ``to_f16``, for it needs no comparison.
    """
    bits = bits_of(value)
    bits = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return f32_of(bits & np.uint32(0xFFFFE000))

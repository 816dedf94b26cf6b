"""The fast backend: compiled loops on the CPU, bit-equal to torch, which it does not import."""

from __future__ import annotations

from typing import Final

import ml_dtypes
import numpy as np

from tensorsurgeon.quant.loops.loader import Kernels
from tensorsurgeon.quant.rtn.arithmetic import Arithmetic, arithmetic_of, code_range, global_scale_of, half_range
from tensorsurgeon.quant.rtn.backend import check_groups, is_supported, refuse_nonfinite_scale, refuse_nonfinite_weight
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.arrays import empty
from tensorsurgeon.tensors.dtypes import BF16, F16, F32, DType, dtype_of

_integers, _floats = Kernels("integer_codes"), Kernels("float_codes")

# The kernels tell dtypes apart by the type of the bits.
_BITS: Final = {BF16: np.uint16, F16: np.int16, F32: np.uint32}
_PRECISION: Final = {F32: 0, BF16: 1, F16: 2}
_BY_RECIPROCAL: Final = 3
_ZERO_GROUP: Final = {"replace": 0, "floor": 1, "range": 2}
_ZERO_POINT: Final = {"compressed-tensors": 0, "quark": 1}
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class FastBackend:
    """Every scheme that the torch backend serves; one thread per call, without the GIL."""

    name = "fast"

    def serves(self, scheme: Scheme, dtype: DType) -> bool:
        """Whether weights of this dtype can be quantized by this scheme."""
        return is_supported(scheme, dtype)

    def quantize(self, weight: np.ndarray, scheme: Scheme, *, global_amax: float | None = None) -> Quantized:
        """Codes and scales of a weight [N, K]; see ``Backend``."""
        check_groups(weight.shape, scheme)
        dtype = dtype_of(weight)
        bits = np.require(np.ascontiguousarray(weight), requirements="A").view(_BITS[dtype])
        # Of one kind, whether the caller may write to the weight or not: so is the code that a small one warms up.
        bits.flags.writeable = False
        if bits.size == 0:
            raise ValueError(f"an empty weight {list(weight.shape)} has no scales")
        if scheme.type == "nvfp4":
            return _nvfp4(weight, bits, scheme, global_amax)
        if scheme.type == "mxfp4":
            return _mxfp4(weight, bits, scheme)
        arithmetic = arithmetic_of(scheme, dtype)
        quantized = (_fp8 if scheme.type == "fp8" else _integer)(weight, bits, scheme, arithmetic)
        if not np.isfinite(quantized.scale).all():
            refuse_nonfinite_scale(quantized.scale, arithmetic)
        return quantized

    def dequantize(self, quantized: Quantized, scheme: Scheme, dtype: DType) -> np.ndarray:
        """Weights [N, K] in ``dtype``; see ``Backend``."""
        rows, columns = quantized.codes.shape
        scale = quantized.scale
        if quantized.global_scale is not None:
            scale = scale / quantized.global_scale
        if scheme.type in ("nvfp4", "mxfp4"):
            values = np.array([*_E2M1, *(-v for v in _E2M1)], np.float32)[quantized.codes]
        else:
            values = quantized.codes.astype(np.float32)
        if scheme.block is not None:
            height, width = scheme.block
            full = scale.repeat(height, 0)[:rows].repeat(width, 1)[:, :columns]
            return np.asarray((values * full).astype(dtype.numpy, copy=False))
        if scheme.group_size > 0 and columns % scheme.group_size:
            # The last group is short.
            zero = 0 if quantized.zero_point is None else _spread(quantized.zero_point, scheme.group_size, columns)
            return np.asarray(((values - zero) * _spread(scale, scheme.group_size, columns)).astype(dtype.numpy, copy=False))
        groups = values.reshape(rows, scheme.groups(columns), -1)
        if quantized.zero_point is not None:
            groups -= quantized.zero_point.astype(np.float32)[:, :, None]
        groups *= scale[:, :, None]
        return np.asarray(groups.reshape(rows, columns).astype(dtype.numpy, copy=False))


def _spread(by_group: np.ndarray, size: int, columns: int) -> np.ndarray:
    """F32 [N, K] of values that groups of ``size`` inputs share."""
    return by_group.astype(np.float32).repeat(size, 1)[:, :columns]


def _how(arithmetic: Arithmetic) -> int:
    return _BY_RECIPROCAL if arithmetic.reciprocal else _PRECISION[arithmetic.quotient]


def _integer(weight: np.ndarray, bits: np.ndarray, scheme: Scheme, arithmetic: Arithmetic) -> Quantized:
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    codes, scale = empty((rows, columns), np.int8), empty((rows, groups), np.float32)
    low, high = code_range(scheme)
    first, last, size = np.float32(low), np.float32(high), columns // groups
    math, stored, how = _PRECISION[arithmetic.math], _PRECISION[arithmetic.stored], _how(arithmetic)
    care, late = _ZERO_GROUP[arithmetic.zero_group], arithmetic.rounds_late
    # The span of [-1, 1], as each kind of scheme measures it, takes the floor's place.
    floor = np.float32(arithmetic.floor if arithmetic.zero_group != "range" else 1 if scheme.symmetric else 2)
    zero_point = None
    scratch = empty((3 if scheme.symmetric else 5, groups), np.float32)
    if scheme.symmetric:
        steps, signed = np.float32(half_range(scheme)), scheme.rule in ("autoround", "awq")
        bad = _integers.symmetric(
            bits, size, first, last, steps, math, stored, how, care, floor, late, signed, codes, scale, scratch
        )
    else:
        zero_point = empty((rows, groups), np.int8)
        way, shift = _ZERO_POINT.get(scheme.rule, 2), low - scheme.qmin
        bad = _integers.asymmetric(
            bits, size, first, last, math, stored, how, care, floor, late, way, shift, codes, scale, zero_point, scratch
        )
    if bad >= 0:
        refuse_nonfinite_weight(weight)
    return Quantized(codes, scale, zero_point)


def _fp8(weight: np.ndarray, bits: np.ndarray, scheme: Scheme, arithmetic: Arithmetic) -> Quantized:
    rows, columns = weight.shape
    height, width = scheme.block or (1, columns if scheme.group_size == -1 else scheme.group_size)
    codes = empty((rows, columns), np.uint8)
    scale = empty((-(-rows // height), -(-columns // width)), np.float32)
    math, stored = _PRECISION[arithmetic.math], _PRECISION[arithmetic.stored]
    floor = np.float32(arithmetic.floor)
    if _floats.fp8(bits, height, width, math, stored, _how(arithmetic), floor, codes, scale) >= 0:
        refuse_nonfinite_weight(weight)
    return Quantized(codes.view(ml_dtypes.float8_e4m3fn), scale)


def _nvfp4(weight: np.ndarray, bits: np.ndarray, scheme: Scheme, global_amax: float | None) -> Quantized:
    amax = float(_floats.weight_amax(bits))
    if not np.isfinite(amax):
        refuse_nonfinite_weight(weight)
    dtype = dtype_of(weight)
    multiplier = global_scale_of(amax if global_amax is None else global_amax, dtype)
    rows, columns = weight.shape
    codes, scale = empty((rows, columns), np.uint8), empty((rows, scheme.groups(columns)), np.float32)
    least = np.float32(0.125)
    _floats.nvfp4(bits, columns // scale.shape[1], _PRECISION[dtype], multiplier[0], least, codes, scale)
    return Quantized(codes, scale, None, multiplier)


def _mxfp4(weight: np.ndarray, bits: np.ndarray, scheme: Scheme) -> Quantized:
    rows, columns = weight.shape
    codes, scale = empty((rows, columns), np.uint8), empty((rows, scheme.groups(columns)), np.float32)
    if _floats.mxfp4(bits, columns // scale.shape[1], codes, scale) >= 0:
        refuse_nonfinite_weight(weight)
    return Quantized(codes, scale)

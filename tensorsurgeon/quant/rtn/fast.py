"""The fast backend: compiled loops on the CPU, bit-equal to torch, which it does not import."""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np

from tensorsurgeon.quant.loops import choices
from tensorsurgeon.quant.rtn.arithmetic import Arithmetic, arithmetic_of, code_range, global_scale_of, half_range
from tensorsurgeon.quant.rtn.backend import check_groups, is_supported, refuse_nonfinite_scale, refuse_nonfinite_weight
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.arrays import empty
from tensorsurgeon.tensors.dtypes import BF16, F16, F32, DType, dtype_of

# The kernels tell dtypes apart by the type of the bits.
_BITS: Final = {BF16: np.uint16, F16: np.int16, F32: np.uint32}
_PRECISION: Final = {F32: choices.AS_F32, BF16: choices.AS_BF16, F16: choices.AS_F16}
_ZERO_GROUP: Final = {"replace": choices.REPLACE_ZERO, "floor": choices.LIFT_TO_FLOOR, "range": choices.UNIT_RANGE}
_ZERO_POINT: Final = {"compressed-tensors": choices.ZERO_OF_SPAN, "quark": choices.ZERO_CLAMPED}
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


def _roundings(arithmetic: Arithmetic) -> dict[str, Any]:
    """Where a loop rounds, by the names of its arguments."""
    return {
        "math": _PRECISION[arithmetic.math],
        "stored": _PRECISION[arithmetic.stored],
        "quotient": choices.BY_RECIPROCAL if arithmetic.reciprocal else _PRECISION[arithmetic.quotient],
        "floor": np.float32(arithmetic.floor),
    }


def _spread(by_group: np.ndarray, size: int, columns: int) -> np.ndarray:
    """F32 [N, K] of values that groups of ``size`` inputs share."""
    return by_group.astype(np.float32).repeat(size, 1)[:, :columns]


def _integer(weight: np.ndarray, bits: np.ndarray, scheme: Scheme, arithmetic: Arithmetic) -> Quantized:
    from tensorsurgeon.quant.loops import integer_codes

    rows, columns = weight.shape
    groups = scheme.groups(columns)
    codes, scale = empty((rows, columns), np.int8), empty((rows, groups), np.float32)
    zero_point = None
    low, high = code_range(scheme)
    common = {
        "size": columns // groups,
        "low": np.float32(low),
        "high": np.float32(high),
        "zero_group": _ZERO_GROUP[arithmetic.zero_group],
        "rounds_late": arithmetic.rounds_late,
        "codes": codes,
        "scale": scale,
        **_roundings(arithmetic),
    }
    if scheme.symmetric:
        bad = integer_codes.symmetric(
            bits,
            steps=np.float32(half_range(scheme)),
            signed=scheme.has_signed_scales,
            scratch=empty((3, groups), np.float32),
            **common,
        )
    else:
        zero_point = empty((rows, groups), np.int8)
        bad = integer_codes.asymmetric(
            bits,
            zeros=_ZERO_POINT.get(scheme.rule, choices.ZERO_ROUNDED),
            shift=low - scheme.qmin,
            zero_point=zero_point,
            scratch=empty((5, groups), np.float32),
            **common,
        )
    if bad >= 0:
        refuse_nonfinite_weight(weight)
    return Quantized(codes, scale, zero_point)


def _fp8(weight: np.ndarray, bits: np.ndarray, scheme: Scheme, arithmetic: Arithmetic) -> Quantized:
    from tensorsurgeon.quant.loops import float_codes

    rows, columns = weight.shape
    height, width = scheme.block or (1, columns if scheme.group_size == -1 else scheme.group_size)
    codes = empty((rows, columns), np.uint8)
    scale = empty((-(-rows // height), -(-columns // width)), np.float32)
    if float_codes.fp8(bits, height=height, width=width, codes=codes, scale=scale, **_roundings(arithmetic)) >= 0:
        refuse_nonfinite_weight(weight)
    return Quantized(codes.view(ml_dtypes.float8_e4m3fn), scale)


def _nvfp4(weight: np.ndarray, bits: np.ndarray, scheme: Scheme, global_amax: float | None) -> Quantized:
    from tensorsurgeon.quant.loops import float_codes

    amax = float(float_codes.weight_amax(bits))
    if not np.isfinite(amax):
        refuse_nonfinite_weight(weight)
    dtype = dtype_of(weight)
    multiplier = global_scale_of(amax if global_amax is None else global_amax, dtype)
    rows, columns = weight.shape
    codes, scale = empty((rows, columns), np.uint8), empty((rows, scheme.groups(columns)), np.float32)
    least = np.float32(0.125)
    float_codes.nvfp4(bits, columns // scale.shape[1], _PRECISION[dtype], multiplier[0], least, codes, scale)
    return Quantized(codes, scale, None, multiplier)


def _mxfp4(weight: np.ndarray, bits: np.ndarray, scheme: Scheme) -> Quantized:
    from tensorsurgeon.quant.loops import float_codes

    rows, columns = weight.shape
    codes, scale = empty((rows, columns), np.uint8), empty((rows, scheme.groups(columns)), np.float32)
    if float_codes.mxfp4(bits, columns // scale.shape[1], codes, scale) >= 0:
        refuse_nonfinite_weight(weight)
    return Quantized(codes, scale)

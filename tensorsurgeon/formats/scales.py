"""Scales on their way to disk: stored as promised, or refused.

The codes of a weight were chosen for scales of a certain value. A scale that turns into infinity, zero or merely
another value when it is stored makes every weight of its group wrong without a sign of it, so it is an error here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from tensorsurgeon.errors import NumericError, SpecError
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import F32, DType

# Quark's exporter writes zero points beside symmetric codes too; they say nothing as long as they are zero.
WEIGHT_SHAPE: Final = "weight_shape"
"""Beside packed words, which may hold more than the weight's columns."""

ZERO_POINT: Final = "weight_zero_point"
# What a static quantization of a module's inputs stores beside its weight.
INPUT_SCALES: Final = ("input_scale", "input_zero_point", "input_global_scale", "activation_scale")
# What a quantized KV cache stores, beside the attention's linears or beside the attention.
KV_SCALES: Final = ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "output_scale", "output_zero_point")


def stored_scale(scale: np.ndarray, dtype: DType, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """float32 scales as ``dtype``, negative ones included (AutoRound's are), in ``shape`` where one is given.

    NumericError if a scale is not finite or ``dtype`` cannot hold its value exactly.
    """
    target = scale if shape is None else scale.reshape(shape)
    if dtype is F32:
        stored = np.ascontiguousarray(target, np.float32)
        if not np.isfinite(stored).all():
            raise NumericError(f"scale {_first(stored, ~np.isfinite(stored))} is not finite")
        return stored
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.ascontiguousarray(target.astype(dtype.numpy))
        wrong = (stored.astype(np.float32) != target) | ~np.isfinite(target)
    if wrong.any():
        raise NumericError(_refusal(target, stored, wrong, dtype))
    return stored


def loaded_scale(stored: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Scales of any float type as float32."""
    scale = stored.astype(np.float32, copy=False)
    return scale if shape is None else scale.reshape(shape)


def with_scale_dtype(scheme: Scheme, dtype: DType) -> Scheme:
    """``scheme`` with its scales stored as ``dtype`` unless it says otherwise itself."""
    return scheme if scheme.scale_dtype is not None else replace(scheme, scale_dtype=dtype)


def scale_dtype_of(scheme: Scheme) -> DType:
    """The stored dtype of a resolved scheme; SpecError if it was not resolved."""
    if scheme.scale_dtype is None:
        raise SpecError("the scheme does not say how scales are stored; call resolve_scheme with the weight's dtype first")
    return scheme.scale_dtype


def _first(values: np.ndarray, where: np.ndarray) -> float:
    return float(values[where].flat[0])


def _refusal(scale: np.ndarray, stored: np.ndarray, wrong: np.ndarray, dtype: DType) -> str:
    value, became = _first(scale, wrong), float(stored.astype(np.float32)[wrong].flat[0])
    if not np.isfinite(value):
        return f"scale {value} is not finite"
    if not np.isfinite(became):
        return f"scale {value:.6g} overflows {dtype}; store scales in a wider type or leave this module unquantized"
    if became == 0:
        return f"scale {value:.6g} underflows {dtype} and would read every weight of its group as 0; use a wider type"
    return f"scale {value:.9g} would be stored in {dtype} as {became:.9g}; round scales before choosing codes"

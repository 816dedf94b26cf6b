"""Codes, zero points and scales as AWQ's GEMM layout stores them: transposed, along the outputs, interleaved.

``qweight`` I32 [K, N/8]: word c of input k holds outputs 8c to 8c+7, nibble i that of output 8c + [0,2,4,6,1,3,5,7][i].
``qzeros`` I32 [G, N/8] in the same order, the true zero points. ``scales`` [G, N]. Shared by AWQ and AutoRound.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tensorsurgeon.formats.gptq_words import require_symmetric
from tensorsurgeon.formats.scales import loaded_scale, scale_dtype_of, stored_scale
from tensorsurgeon.formats.stored_checks import axes
from tensorsurgeon.quant.bitpack import AWQ_ORDER, pack_transposed, unpack_transposed
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F16, I32
from tensorsurgeon.tensors.spec import TensorSpec

_HALF = 8


def awq_tensors(weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """``qweight``, ``qzeros``, ``scales`` of a weight [N, K] of 4 bits."""
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    return (
        TensorSpec("qweight", I32, (columns, rows // 8)),
        TensorSpec("qzeros", I32, (groups, rows // 8)),
        TensorSpec("scales", scheme.scale_dtype or F16, (groups, rows)),
    )


def pack_awq(quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
    """Arrays of ``awq_tensors``; symmetric schemes store the constant zero point 8."""
    zero_point = quantized.zero_point
    if zero_point is None:
        zero_point = np.zeros(quantized.scale.shape, np.int8)
    return (
        pack_transposed(quantized.codes, 4, offset=_HALF, order=AWQ_ORDER),
        pack_transposed(zero_point, 4, offset=_HALF, order=AWQ_ORDER),
        stored_scale(quantized.scale.T, scale_dtype_of(scheme)),
    )


def awq_weight_shape(tensors: Mapping[str, TensorSpec]) -> tuple[int, int]:
    """[N, K]: an output per scale of a group, an input per row of words."""
    return axes(tensors, "scales")[1], axes(tensors, "qweight")[0]


def unpack_awq(arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
    """The inverse of ``pack_awq``; CheckpointError where a symmetric scheme has other zero points than 8."""
    rows = arrays["scales"].shape[1]
    codes = unpack_transposed(arrays["qweight"], 4, rows, offset=_HALF, order=AWQ_ORDER)
    zero_point = unpack_transposed(arrays["qzeros"], 4, rows, offset=_HALF, order=AWQ_ORDER)
    scale = np.ascontiguousarray(loaded_scale(arrays["scales"]).T)
    if scheme.symmetric:
        require_symmetric(zero_point, _HALF)
        return Quantized(codes, scale)
    return Quantized(codes, scale, zero_point)

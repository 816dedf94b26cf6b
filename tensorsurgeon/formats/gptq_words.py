"""Codes, zero points and scales as GPTQ stores them: transposed, along the inputs, in 32-bit words.

``qweight`` I32 [K b / 32, N]: code k of an output in bits of the word above its row, unsigned (code + 2**(b-1)).
``qzeros`` I32 [G, N b / 32]: zero points along the outputs. ``scales`` [G, N]. Shared by GPTQ and AutoRound.

GPTQ v1 stores zero points minus one. GPTQModel subtracts from whole words, so that a zero point of 0 borrows from its
neighbour, and adds to whole words when it reads; done here in the same way, or such neighbours would be misread.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.formats.scales import loaded_scale, scale_dtype_of, stored_scale
from tensorsurgeon.formats.stored_checks import axes
from tensorsurgeon.quant.bitpack import (
    pack_columns,
    pack_transposed,
    unpack_columns,
    unpack_transposed,
    words_per_row,
)
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F16, I32
from tensorsurgeon.tensors.spec import TensorSpec


def gptq_tensors(weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """``qweight``, ``qzeros``, ``scales`` of a weight [N, K]."""
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    return (
        TensorSpec("qweight", I32, (words_per_row(columns, scheme.num_bits), rows)),
        TensorSpec("qzeros", I32, (groups, words_per_row(rows, scheme.num_bits))),
        TensorSpec("scales", scheme.scale_dtype or F16, (groups, rows)),
    )


def pack_gptq(quantized: Quantized, scheme: Scheme, zeros_minus_one: bool) -> tuple[np.ndarray, ...]:
    """Arrays of ``gptq_tensors``; symmetric schemes store the constant zero point 2**(b-1)."""
    bits, half = scheme.num_bits, 1 << (scheme.num_bits - 1)
    zero_point = quantized.zero_point
    if zero_point is None:
        zero_point = np.zeros(quantized.scale.shape, np.int8)
    qzeros = pack_transposed(zero_point, bits, offset=half)
    if zeros_minus_one:
        unsigned = qzeros.view(np.uint32)
        unsigned -= _ones(qzeros.shape[1], len(zero_point), bits)
    return (
        pack_columns(quantized.codes, bits, offset=half),
        qzeros,
        stored_scale(quantized.scale.T, scale_dtype_of(scheme)),
    )


@lru_cache(maxsize=64)
def _ones(words: int, count: int, num_bits: int) -> np.ndarray:
    """uint32 [words] with a 1 in the lowest bit of each of ``count`` packed elements."""
    lowest = np.arange(count, dtype=np.int64) * num_bits
    ones = np.zeros(words, np.uint32)
    np.bitwise_or.at(ones, lowest // 32, np.uint32(1) << (lowest % 32).astype(np.uint32))
    return ones


def gptq_weight_shape(tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
    """[N, K] from the words, which are full: GPTQ takes multiples of 32 inputs."""
    words, rows = axes(tensors, "qweight")
    return rows, words * 32 // scheme.num_bits


def unpack_gptq(arrays: Mapping[str, np.ndarray], scheme: Scheme, zeros_minus_one: bool) -> Quantized:
    """The inverse of ``pack_gptq``; CheckpointError where a symmetric scheme has other zero points than 2**(b-1)."""
    bits, half = scheme.num_bits, 1 << (scheme.num_bits - 1)
    scales = arrays["scales"]
    rows = arrays["qweight"].shape[1]
    columns = arrays["qweight"].shape[0] * 32 // bits
    codes = unpack_columns(arrays["qweight"], bits, columns, offset=half)
    qzeros = arrays["qzeros"]
    if zeros_minus_one:
        qzeros = (qzeros.view(np.uint32) + _ones(qzeros.shape[1], rows, bits)).view(np.int32)
    zero_point = unpack_transposed(qzeros, bits, rows, offset=half)
    scale = np.ascontiguousarray(loaded_scale(scales, (scheme.groups(columns), rows)).T)
    if scheme.symmetric:
        require_symmetric(zero_point, half)
        return Quantized(codes, scale)
    return Quantized(codes, scale, zero_point)


def refuse_zero_points_of_zero(qzeros: np.ndarray, scheme: Scheme, rows: int) -> None:
    """CheckpointError where v1 stores a zero point of 0, minus one: nobody can tell how without knowing who wrote it.

    GPTQModel borrows from the next field and adds to whole words when it reads; others let each field wrap by itself. The
    stored words may be the same, and then the neighbour is one too high by the one reading or by the other.
    """
    highest = (1 << scheme.num_bits) - 1
    found = unpack_transposed(qzeros, scheme.num_bits, rows, signed=False)
    if (found == highest).any():
        raise CheckpointError(
            f"qzeros: a zero point is stored as {highest}, which is 0 minus one, and writers of GPTQ v1 do that in two ways: on "
            "each zero point, or on whole words, as GPTQModel does. If GPTQModel wrote this checkpoint, say so in "
            'quantization_config: "meta": {"quantizer": ["gptqmodel"]}'
        )


def require_symmetric(zero_point: np.ndarray, half: int) -> None:
    """CheckpointError unless every zero point is 0 (stored as ``half``)."""
    if zero_point.any():
        odd = int(zero_point[zero_point != 0].flat[0])
        raise CheckpointError(
            f"the config says the weight is symmetric, whose zero points are all {half}, but one is {odd + half}; "
            "the config is wrong, or the zero points follow another convention (GPTQ v1 or v2)"
        )


def check_group_index(g_idx: np.ndarray, scheme: Scheme) -> None:
    """CheckpointError unless input k belongs to group ``k // group_size``: other orders need their own layout."""
    # Axes of 1 more or fewer say the same.
    g_idx = g_idx.reshape(-1)
    columns = len(g_idx)
    size = columns if scheme.group_size == -1 else scheme.group_size
    expected = group_index(columns, size)
    wrong = np.flatnonzero(g_idx != expected)
    if wrong.size:
        k = int(wrong[0])
        raise CheckpointError(
            f"g_idx puts input {k} into group {int(g_idx[k])} instead of {int(expected[k])}: the weight was quantized "
            "with activation order (desc_act) and without static groups, which cannot be read"
        )


def group_index(in_features: int, group_size: int) -> np.ndarray:
    """The trivial ``g_idx``: the group of every input."""
    return np.arange(in_features, dtype=np.int32) // np.int32(group_size)

"""compressed-tensors pack-quantized: integer weights of 2 to 8 bits in 32-bit words, activations left alone.

``weight_packed`` I32 [N, ceil(K b / 32)] holds ``code + 2**(b-1)`` along the inputs; ``weight_scale`` [N, G];
``weight_zero_point`` I32 [ceil(N b / 32), G] (asymmetric only) along the *outputs*; ``weight_shape`` I64 [2].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.formats import ct_config
from tensorsurgeon.formats.config_reading import boolean, integer, modules_with, one_of
from tensorsurgeon.formats.ct_config import CtFormat, GroupArgs
from tensorsurgeon.formats.scales import loaded_scale, scale_dtype_of, stored_scale, with_scale_dtype
from tensorsurgeon.formats.stored_checks import axes
from tensorsurgeon.formats.weight_checks import check_group_size, check_matrix, check_scheme
from tensorsurgeon.quant.bitpack import pack_columns, pack_rows, unpack_columns, unpack_rows, words_per_row
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import I8, I32, I64, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

LAYOUT = "pack-quantized"


@dataclass(frozen=True, slots=True)
class CtPacked(CtFormat):
    """W2A16 to W8A16, symmetric or with zero points, per group or per channel."""

    name: ClassVar[str] = "ct-packed"
    words: ClassVar[tuple[str, ...]] = (LAYOUT,)
    activations: ClassVar[tuple[str, ...]] = ("none",)

    def default_scheme(self) -> Scheme:
        """W4A16 in groups of 128."""
        return Scheme(num_bits=4, group_size=128, rule="compressed-tensors")

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """Scales are stored in the weight's dtype, as llm-compressor does."""
        return with_scale_dtype(scheme, weight_dtype)

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """2 to 8 bits; groups must divide the inputs."""
        check_matrix(weight, self.name)
        check_scheme(weight, scheme, self.name, num_bits=range(2, 9), symmetric=(True, False))
        check_group_size(weight, scheme, self.name)

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``weight_packed``, ``weight_scale``, ``weight_zero_point`` where asymmetric, ``weight_shape``."""
        rows, columns = weight.shape
        groups = scheme.groups(columns)
        zero_point = TensorSpec("weight_zero_point", I32, (words_per_row(rows, scheme.num_bits), groups))
        return (
            TensorSpec("weight_packed", I32, (rows, words_per_row(columns, scheme.num_bits))),
            TensorSpec("weight_scale", scheme.scale_dtype or weight.dtype, (rows, groups)),
            *(() if scheme.symmetric else (zero_point,)),
            TensorSpec("weight_shape", I64, (2,)),
        )

    def local_names(self, scheme: Scheme) -> tuple[str, ...]:
        """As ``tensors`` has them."""
        zero_point = () if scheme.symmetric else ("weight_zero_point",)
        return "weight_packed", "weight_scale", *zero_point, "weight_shape"

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """No."""
        # weight_shape belongs to no row, and the words of a zero point hold those of several rows.
        return False

    def rows_together(self, scheme: Scheme) -> int:
        """Rows of symmetric codes are rows of words and scales, beside a shape that is read with each of them."""
        return 1 if scheme.symmetric else 0

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """Codes along the inputs, zero points along the outputs, both with the sign moved away."""
        bits, offset = scheme.num_bits, 1 << (scheme.num_bits - 1)
        zero_point: tuple[np.ndarray, ...] = ()
        if quantized.zero_point is not None:
            zero_point = (pack_columns(np.ascontiguousarray(quantized.zero_point.T), bits, offset=offset),)
        return (
            pack_rows(quantized.codes, bits, offset=offset),
            stored_scale(quantized.scale, scale_dtype_of(scheme)),
            *zero_point,
            np.array(quantized.codes.shape, np.int64),
        )

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """From the scales where groups fill the words, else from full words, for only ``weight_shape`` says more."""
        rows, words = axes(tensors, "weight_packed")
        if scheme.group_size > 0:
            columns = axes(tensors, "weight_scale")[1] * scheme.group_size
            if words_per_row(columns, scheme.num_bits) == words:
                return rows, columns
        return rows, words * 32 // scheme.num_bits

    def also_reads(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """Zero points of a byte each, as they are before they are packed, and the shape in I32, as Kimi K2 has it."""
        return (
            TensorSpec("weight_zero_point", I8, (weight.shape[0], scheme.groups(weight.shape[1]))),
            TensorSpec("weight_shape", I32, (2,)),
        )

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """CheckpointError if ``weight_shape`` does not fit the words."""
        rows, columns = map(int, arrays["weight_shape"].reshape(-1))
        packed = arrays["weight_packed"]
        if (len(packed), packed.shape[1]) != (rows, words_per_row(columns, scheme.num_bits)):
            raise CheckpointError(
                f"weight_shape says {[rows, columns]}, which {scheme.num_bits} bits do not pack into the "
                f"{list(packed.shape)} words of weight_packed"
            )
        offset = 1 << (scheme.num_bits - 1)
        codes = unpack_rows(packed, scheme.num_bits, columns, offset=offset)
        zero_point = None
        if not scheme.symmetric:
            stored = arrays["weight_zero_point"]
            if stored.dtype != np.int8:
                stored = np.ascontiguousarray(unpack_columns(stored, scheme.num_bits, rows, offset=offset).T)
            zero_point = stored.reshape(rows, -1)
        return Quantized(codes, loaded_scale(arrays["weight_scale"], (rows, scheme.groups(columns))), zero_point)

    def group_args(self, activations: str) -> GroupArgs:
        """Activations stay as they are."""
        return GroupArgs(LAYOUT, _weights, lambda scheme: None)

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with a ``weight_packed`` of 32-bit words."""
        stored = modules_with(specs, "weight_packed", (I32,))
        schemes = ct_config.read_config(config, specs, LAYOUT, stored, _scheme_of)
        ct_config.check_zero_points(schemes, specs)
        return schemes


def _weights(scheme: Scheme) -> dict[str, Any]:
    strategy = "channel" if scheme.group_size == -1 else "group"
    group_size = None if scheme.group_size == -1 else scheme.group_size
    return ct_config.args(scheme.num_bits, "int", strategy, group_size=group_size, symmetric=scheme.symmetric)


def _scheme_of(weights: ct_config.WeightArgs) -> Scheme:
    args, path = weights
    one_of(args, "type", ("int",), path, default="int")
    group_size = integer(args, "group_size", path, default=-1)
    # Left out, the strategy follows from the group size; group_size -1 is written by old versions for channels.
    inferred = "channel" if group_size == -1 else "group"
    strategy = one_of(args, "strategy", ("channel", "group"), path, default=inferred)
    return Scheme(
        num_bits=one_of(args, "num_bits", range(2, 9), path, default=8),
        symmetric=boolean(args, "symmetric", path, default=True),
        group_size=-1 if strategy == "channel" else group_size,
        rule="compressed-tensors",
    )

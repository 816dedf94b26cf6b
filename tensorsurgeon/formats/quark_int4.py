"""AMD Quark INT4 and UINT4: 4-bit weights in 32-bit words, activations left alone.

Per group the weight is transposed: ``weight`` I32 [K, ceil(N/8)], ``weight_scale`` [G, N], ``weight_zero_point`` I32
[G, ceil(N/8)]. Per channel it is not: ``weight`` I32 [N, ceil(K/8)], ``weight_scale`` [N], ``weight_zero_point`` I32
[ceil(N/8)]. int4 (symmetric) keeps two's complement nibbles; uint4 (asymmetric) has zero points. ``pack_method``
``reorder`` interleaves the nibbles as AWQ does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np

from tensorsurgeon.errors import ConfigError
from tensorsurgeon.formats import quark_config
from tensorsurgeon.formats.base import ConfigFiles, Format, QuantizedModel
from tensorsurgeon.formats.config_reading import TOP, integer, modules_with, one_of, section
from tensorsurgeon.formats.coverage import activations_of
from tensorsurgeon.formats.scales import loaded_scale, scale_dtype_of, stored_scale, with_scale_dtype
from tensorsurgeon.formats.stored_checks import axes
from tensorsurgeon.formats.weight_checks import check_group_size, check_matrix, check_scheme
from tensorsurgeon.quant.bitpack import (
    AWQ_ORDER,
    NATURAL_ORDER,
    pack_rows,
    pack_transposed,
    unpack_rows,
    unpack_transposed,
)
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F16, F32, I32, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec


@dataclass(frozen=True, slots=True)
class QuarkInt4(Format):
    """W4A16, symmetric (int4) or with zero points (uint4); vLLM reads it per group."""

    pack_method: Literal["order", "reorder"] = "reorder"

    name: ClassVar[str] = "quark-int4"
    quant_method: ClassVar[str] = "quark"
    words: ClassVar[tuple[str, ...]] = ("int4", "uint4")
    activations: ClassVar[tuple[str, ...]] = ("none",)
    word_in = staticmethod(quark_config.word_in)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], specs: SpecMap) -> Self:
        """With the order of nibbles that ``pack_method`` finds."""
        return cls(pack_method(config, specs))

    def default_scheme(self) -> Scheme:
        """Symmetric, in groups of 128."""
        return Scheme(num_bits=4, group_size=128, rule="quark")

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """Scales are stored as F32, as Quark does from file to file."""
        return with_scale_dtype(scheme, F32)

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """4 bits; groups must divide the inputs."""
        check_matrix(weight, self.name)
        check_scheme(weight, scheme, self.name, num_bits=(4,), symmetric=(True, False), scale_dtypes=(F32, BF16, F16))
        check_group_size(weight, scheme, self.name)

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``weight``, ``weight_scale`` and, for uint4, ``weight_zero_point``."""
        rows, columns = weight.shape
        packed_rows, packed_columns = -(-rows // 8), -(-columns // 8)
        dtype = scheme.scale_dtype or F32
        if scheme.group_size == -1:
            shapes: tuple[tuple[int, ...], ...] = ((rows, packed_columns), (rows,), (packed_rows,))
        else:
            groups = scheme.groups(columns)
            shapes = ((columns, packed_rows), (groups, rows), (groups, packed_rows))
        weight_shape, scale_shape, zero_shape = shapes
        zero_point = TensorSpec("weight_zero_point", I32, zero_shape)
        return (
            TensorSpec("weight", I32, weight_shape),
            TensorSpec("weight_scale", dtype, scale_shape),
            *(() if scheme.symmetric else (zero_point,)),
        )

    def local_names(self, scheme: Scheme) -> tuple[str, ...]:
        """As ``tensors`` has them."""
        return "weight", "weight_scale", *(() if scheme.symmetric else ("weight_zero_point",))

    def also_reads(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """The untransposed scales of Quark's file-to-file writer."""
        rows, columns = weight.shape
        return (TensorSpec("weight_scale", scheme.scale_dtype or F32, (rows, scheme.groups(columns))),)

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """Only symmetric per channel; groups are transposed and zero points share words."""
        return scheme.group_size == -1 and scheme.symmetric

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """Transposed words per group, rows of words per channel."""
        dtype, order, offset = scale_dtype_of(scheme), self._order, 0 if scheme.symmetric else 8
        zero_point = quantized.zero_point
        if scheme.group_size == -1:
            words = pack_rows(quantized.codes, 4, offset=offset, order=order)
            scale = stored_scale(quantized.scale, dtype, (len(quantized.codes),))
        else:
            words = pack_transposed(quantized.codes, 4, offset=offset, order=order)
            scale = stored_scale(quantized.scale.T, dtype)
        if zero_point is None:
            return words, scale
        packed = pack_transposed(zero_point, 4, offset=offset, order=order)
        return words, scale, packed[0] if scheme.group_size == -1 else packed

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """N from the scales; K from the rows of words, which per channel must be full."""
        words = axes(tensors, "weight")
        if scheme.group_size == -1:
            return words[0], words[1] * 8
        scale, columns = axes(tensors, "weight_scale"), words[0]
        return scale[0] if _is_untransposed(scale, columns, scheme) else scale[1], columns

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """Also with zero points of 0 beside int4, and with the untransposed scales of Quark's file-to-file writer."""
        words, scale = arrays["weight"], loaded_scale(arrays["weight_scale"])
        order, offset = self._order, 0 if scheme.symmetric else 8
        if scheme.group_size == -1:
            rows = len(words)
            codes = unpack_rows(words, 4, words.shape[1] * 8, offset=offset, order=order)
            scale = scale.reshape(rows, 1)
        else:
            if not _is_untransposed(scale.shape, len(words), scheme):
                scale = np.ascontiguousarray(scale.T)
            rows = len(scale)
            codes = unpack_transposed(words, 4, rows, offset=offset, order=order)
        if scheme.symmetric:
            return Quantized(codes, scale)
        packed = arrays["weight_zero_point"]
        zero_point = unpack_transposed(packed.reshape(-1, packed.shape[-1]), 4, rows, offset=offset, order=order)
        return Quantized(codes, scale, zero_point)

    def config_files(self, model: QuantizedModel) -> ConfigFiles:
        """One scheme, no activations."""
        activations_of(model, self.name, self.activations)
        return quark_config.write_config(model, _weight_config, None, self.name, self.pack_method)

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with an I32 ``weight``."""
        stored = modules_with(specs, "weight", (I32,))
        found = pack_method(config, specs)
        if found != self.pack_method:
            raise ConfigError(f"{TOP}.export.pack_method: found {found!r}, expected {self.pack_method!r}")
        return quark_config.read_config(config, specs, stored, _scheme_of)

    @property
    def _order(self) -> tuple[int, ...]:
        return AWQ_ORDER if self.pack_method == "reorder" else NATURAL_ORDER


def pack_method(config: Mapping[str, Any], specs: SpecMap) -> Literal["order", "reorder"]:
    """How a checkpoint's nibbles are ordered, whatever its config says.

    Quark 0.13's file-to-file writer packs in natural order, leaves the scales of groups untransposed [N, G] and
    still writes ``reorder`` (formats.md section 5); such scales give it away.
    """
    said = one_of(section(config, "export"), "pack_method", ("order", "reorder"), f"{TOP}.export", default="reorder")
    for module in modules_with(specs, "weight", (I32,)):
        scale = specs.get(f"{module}.weight_scale")
        if scale is not None and len(scale.shape) == 2:
            words = specs[f"{module}.weight"].shape
            if -(-scale.shape[0] // 8) == words[1] and -(-scale.shape[1] // 8) != words[1]:
                return "order"
    return "order" if said == "order" else "reorder"


def _is_untransposed(scale: tuple[int, ...], in_features: int, scheme: Scheme) -> bool:
    groups = scheme.groups(in_features)
    return scale[1] == groups and scale[0] != groups


def _weight_config(scheme: Scheme) -> dict[str, Any]:
    dtype = "int4" if scheme.symmetric else "uint4"
    if scheme.group_size == -1:
        return quark_config.tensor_config(dtype, "per_channel", ch_axis=0, symmetric=scheme.symmetric)
    return quark_config.tensor_config(
        dtype,
        "per_group",
        ch_axis=1,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        observer_cls="PerGroupMinMaxObserver",
    )


def _scheme_of(weight: Mapping[str, Any], path: str) -> Scheme:
    dtype = one_of(weight, "dtype", ("int4", "uint4"), path)
    symmetric = one_of(weight, "symmetric", (dtype == "int4",), path, default=dtype == "int4")
    if one_of(weight, "qscheme", ("per_group", "per_channel"), path) == "per_channel":
        one_of(weight, "ch_axis", (0,), path, default=0)
        return Scheme(num_bits=4, symmetric=symmetric, rule="quark")
    one_of(weight, "ch_axis", (1, -1), path, default=1)
    return Scheme(num_bits=4, symmetric=symmetric, group_size=integer(weight, "group_size", path), rule="quark")

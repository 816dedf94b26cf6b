"""Plain codes and their scales: one byte for each weight, where it stands in the weight, and a tensor of scales.

Five layouts are this and differ in values only: what a code is, what the scales are called, stored as and shaped
like, and what the config says. A layout of this kind is a class with those values and its config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tensorsurgeon.formats.base import Format
from tensorsurgeon.formats.scales import loaded_scale, scale_dtype_of, stored_scale, with_scale_dtype
from tensorsurgeon.formats.stored_checks import axes
from tensorsurgeon.formats.weight_checks import blocks_of, check_group_size, check_matrix, check_scheme
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import WEIGHT_DTYPES, DType
from tensorsurgeon.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class PlainCodes(Format):
    """``weight`` [N, K] in ``codes`` and a scale per row or per block of it.

    ``default``: the scheme used where nothing is said. ``scale_name``: the tensor of the scales; ``stored_as``: their
    dtype, None for that of the weight; ``scale_dtypes``: what they may be instead. ``vector``: whether scales per row
    are [N], and not [N, 1]. ``blocks``: rows x columns under one scale that the layout takes, None for whole rows.
    """

    name: ClassVar[str]
    codes: ClassVar[DType]
    default: ClassVar[Scheme]
    scale_name: ClassVar[str] = "weight_scale"
    stored_as: ClassVar[DType | None] = None
    scale_dtypes: ClassVar[tuple[DType, ...]] = WEIGHT_DTYPES
    vector: ClassVar[bool] = False
    blocks: ClassVar[tuple[tuple[int, int] | None, ...]] = (None,)

    def default_scheme(self) -> Scheme:
        """``default``."""
        return self.default

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """Scales are stored as ``stored_as``, or else in the weight's dtype."""
        return with_scale_dtype(scheme, self.stored_as or weight_dtype)

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """Any float matrix with one scale per row, or per block where the layout has blocks; those may be cut off."""
        check_matrix(weight, self.name)
        check_scheme(weight, scheme, self.name, kind=self.default.type, blocks=self.blocks, scale_dtypes=self.scale_dtypes)
        check_group_size(weight, scheme, self.name, allowed=(-1,))

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``weight`` and its scales."""
        rows, columns = weight.shape
        shape: tuple[int, ...] = (rows,) if self.vector else (rows, 1)
        if scheme.block is not None:
            shape = blocks_of(rows, columns, scheme.block)
        elif scheme.group_size == 0:
            shape = (1,)
        scale_dtype = scheme.scale_dtype or self.stored_as or weight.dtype
        return TensorSpec("weight", self.codes, (rows, columns)), TensorSpec(self.scale_name, scale_dtype, shape)

    def local_names(self, scheme: Scheme) -> tuple[str, ...]:
        """``weight`` and its scales."""
        return "weight", self.scale_name

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """A row has its codes and its scale, but one row of block scales belongs to many rows."""
        return scheme.block is None

    def rows_together(self, scheme: Scheme) -> int:
        """The height of a block: its rows share a scale."""
        return 1 if scheme.block is None else scheme.block[0]

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """The codes as they are."""
        shape = (len(quantized.codes),) if self.vector else None
        return quantized.codes, stored_scale(quantized.scale, scale_dtype_of(scheme), shape)

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """That of ``weight``."""
        rows, columns = axes(tensors, "weight")
        return rows, columns

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """Scales per row as [N] and as [N, 1]; zero points beside them, which some exporters write, are all 0."""
        codes = arrays["weight"]
        shape = (len(codes), 1) if scheme.block is None else blocks_of(len(codes), codes.shape[1], scheme.block)
        scale = loaded_scale(arrays[self.scale_name])
        return Quantized(codes, np.broadcast_to(scale.reshape(-1, 1), shape) if scheme.group_size == 0 else scale.reshape(shape))

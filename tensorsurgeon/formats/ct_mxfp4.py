"""compressed-tensors MXFP4: ``weight_packed`` U8 [N, K/2] and powers of two for groups of 32.

Two E2M1 codes per byte along the inputs, the first in the low nibble. ``weight_scale`` U8 [N, K/32] has the exponents
with a bias of 127 (E8M0); no global scale. Activations are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from tensorsurgeon.formats import ct_config
from tensorsurgeon.formats.config_reading import modules_with, one_of
from tensorsurgeon.formats.ct_config import CtFormat, GroupArgs
from tensorsurgeon.formats.scales import loaded_scale, stored_scale, with_scale_dtype
from tensorsurgeon.formats.stored_checks import axes
from tensorsurgeon.formats.weight_checks import check_group_size, check_matrix, check_scheme
from tensorsurgeon.quant.bitpack import pack_nibbles, unpack_nibbles
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F8_E8M0, U8, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

LAYOUT = "mxfp4-pack-quantized"


@dataclass(frozen=True, slots=True)
class CtMxfp4(CtFormat):
    """W4A16: groups of 32 whose scales are powers of two; no global scale."""

    name: ClassVar[str] = "ct-mxfp4"
    words: ClassVar[tuple[str, ...]] = (LAYOUT,)
    codes: ClassVar[tuple[str, DType]] = ("weight_packed", U8)
    scale_name: ClassVar[str] = "weight_scale"
    activations: ClassVar[tuple[str, ...]] = ("none",)

    def default_scheme(self) -> Scheme:
        """The only one there is."""
        return Scheme(type="mxfp4", num_bits=4, group_size=32, rule="compressed-tensors")

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """The layout fixes how scales are stored."""
        return with_scale_dtype(scheme, F8_E8M0)

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """Groups of this size must divide the inputs."""
        check_matrix(weight, self.name)
        check_scheme(weight, scheme, self.name, kind="mxfp4", num_bits=(4,), scale_dtypes=(F8_E8M0,))
        check_group_size(weight, scheme, self.name, allowed=(32,))

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``weight_packed`` and its scales."""
        rows, columns = weight.shape
        return (
            TensorSpec(*self.codes, (rows, columns // 2)),
            TensorSpec(self.scale_name, U8, (rows, columns // 32)),
        )

    def local_names(self, scheme: Scheme) -> tuple[str, ...]:
        """As ``tensors`` has them."""
        return self.codes[0], self.scale_name

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """Yes: a row has its codes and its scales."""
        return True

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """Two codes per byte."""
        return pack_nibbles(quantized.codes), stored_scale(quantized.scale, F8_E8M0).view(np.uint8)

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """Two codes per byte of ``weight_packed``."""
        rows, columns = axes(tensors, self.codes[0])
        return rows, columns * 2

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """The inverse of ``pack``."""
        exponents = arrays[self.scale_name].view(ml_dtypes.float8_e8m0fnu)
        return Quantized(unpack_nibbles(arrays[self.codes[0]].view(np.uint8)), loaded_scale(exponents))

    def group_args(self, activations: str) -> GroupArgs:
        """Activations stay as they are."""
        weights = ct_config.args(4, "float", "group", group_size=32, scale_dtype="torch.uint8")
        return GroupArgs(LAYOUT, lambda scheme: weights, lambda scheme: None)

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with a ``weight_packed`` of bytes."""
        stored = modules_with(specs, "weight_packed", (U8,))

        def scheme_of(weights: ct_config.WeightArgs) -> Scheme:
            args, path = weights
            one_of(args, "type", ("float",), path)
            one_of(args, "num_bits", (4,), path)
            one_of(args, "strategy", ("group",), path, default="group")
            one_of(args, "group_size", (32,), path)
            return Scheme(type="mxfp4", num_bits=4, group_size=32, rule="compressed-tensors")

        schemes = ct_config.read_config(config, specs, LAYOUT, stored, scheme_of)
        # The bytes are E8M0 whether the header calls them that or U8.
        scheme = replace(next(iter(schemes.values())), scale_dtype=F8_E8M0)
        return dict.fromkeys(schemes, scheme)

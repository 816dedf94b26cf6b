"""compressed-tensors NVFP4: ``weight_packed`` U8 [N, K/2], E4M3 scales of groups of 16 and one global scale.

Two E2M1 codes per byte along the inputs, the first in the low nibble. ``weight_scale`` F8_E4M3 [N, K/16];
``weight_global_scale`` F32 [1] is a *multiplier*: ``w = code * weight_scale / weight_global_scale``. (ModelOpt stores
its reciprocal.) Activations are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tensorsurgeon.formats import ct_config
from tensorsurgeon.formats.config_reading import modules_with, one_of
from tensorsurgeon.formats.ct_config import CtFormat, GroupArgs
from tensorsurgeon.formats.scales import loaded_scale, stored_scale, with_scale_dtype
from tensorsurgeon.formats.stored_checks import axes
from tensorsurgeon.formats.weight_checks import check_group_size, check_matrix, check_scheme
from tensorsurgeon.quant.bitpack import pack_nibbles, unpack_nibbles
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F8_E4M3, F32, U8, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

LAYOUT = "nvfp4-pack-quantized"


@dataclass(frozen=True, slots=True)
class CtNvfp4(CtFormat):
    """W4A16: groups of 16 with E4M3 scales, under one F32 scale per weight.

    vLLM takes one global scale for a fused module: siblings (q, k and v; gate and up) must be quantized with the
    same one.
    """

    name: ClassVar[str] = "ct-nvfp4"
    words: ClassVar[tuple[str, ...]] = (LAYOUT,)
    activations: ClassVar[tuple[str, ...]] = ("none",)

    def default_scheme(self) -> Scheme:
        """The only one there is."""
        return Scheme(type="nvfp4", num_bits=4, group_size=16, rule="compressed-tensors")

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """The layout fixes how scales are stored."""
        return with_scale_dtype(scheme, F8_E4M3)

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """Groups of this size must divide the inputs."""
        check_matrix(weight, self.name)
        check_scheme(weight, scheme, self.name, kind="nvfp4", num_bits=(4,), scale_dtypes=(F8_E4M3,))
        check_group_size(weight, scheme, self.name, allowed=(16,))

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``weight_packed`` and its scales."""
        rows, columns = weight.shape
        return (
            TensorSpec("weight_packed", U8, (rows, columns // 2)),
            TensorSpec("weight_scale", F8_E4M3, (rows, columns // 16)),
            TensorSpec("weight_global_scale", F32, (1,)),
        )

    def local_names(self, scheme: Scheme) -> tuple[str, ...]:
        """As ``tensors`` has them."""
        return "weight_packed", "weight_scale", "weight_global_scale"

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """No: the global scale is that of the whole weight."""
        return False

    def rows_together(self, scheme: Scheme) -> int:
        """One: to read, the global scale is known."""
        return 1

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """Two codes per byte."""
        if quantized.global_scale is None:
            raise ValueError("nvfp4 weights need a global scale")
        return (
            pack_nibbles(quantized.codes),
            stored_scale(quantized.scale, F8_E4M3),
            stored_scale(quantized.global_scale, F32, (1,)),
        )

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """Two codes per byte of ``weight_packed``."""
        rows, columns = axes(tensors, "weight_packed")
        return rows, columns * 2

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """The inverse of ``pack``."""
        return Quantized(
            unpack_nibbles(arrays["weight_packed"]),
            loaded_scale(arrays["weight_scale"]),
            global_scale=loaded_scale(arrays["weight_global_scale"], (1,)),
        )

    def group_args(self, activations: str) -> GroupArgs:
        """Activations stay as they are."""
        weights = ct_config.args(4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
        return GroupArgs(LAYOUT, lambda scheme: weights, lambda scheme: None)

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with a ``weight_packed`` of bytes."""
        stored = modules_with(specs, "weight_packed", (U8,))

        def scheme_of(weights: ct_config.WeightArgs) -> Scheme:
            args, path = weights
            one_of(args, "type", ("float",), path)
            one_of(args, "num_bits", (4,), path)
            one_of(args, "strategy", ("tensor_group",), path)
            one_of(args, "group_size", (16,), path)
            return Scheme(type="nvfp4", num_bits=4, group_size=16, rule="compressed-tensors")

        return ct_config.read_config(config, specs, LAYOUT, stored, scheme_of)

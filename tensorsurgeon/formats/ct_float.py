"""compressed-tensors float-quantized: FP8 (E4M3) weights with a scale per channel or per 128 x 128 block.

``weight`` F8_E4M3 [N, K]; ``weight_scale`` [N, 1], or [ceil(N / 128), ceil(K / 128)] for blocks, which may be cut
off at the lower and right edge. ``w = weight * weight_scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tensorsurgeon.formats import ct_config
from tensorsurgeon.formats.base import ConfigFiles, QuantizedModel
from tensorsurgeon.formats.config_reading import block_size, integer, modules_with, one_of
from tensorsurgeon.formats.coverage import activations_of
from tensorsurgeon.formats.scales import loaded_scale, scale_dtype_of, stored_scale, with_scale_dtype
from tensorsurgeon.formats.weight_checks import BLOCK, blocks_of, check_group_size, check_matrix, check_scheme
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F8_E4M3, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

LAYOUT = "float-quantized"


@dataclass(frozen=True, slots=True)
class CtFloat:
    """FP8 W8A8, activations quantized while running: per token beside channels, per 128 inputs beside blocks.

    With ``activations: none`` the config asks for W8A16.
    """

    name: ClassVar[str] = "ct_float"
    quant_method: ClassVar[str] = "compressed-tensors"
    activations: ClassVar[tuple[str, ...]] = ("dynamic", "none")

    def default_scheme(self) -> Scheme:
        """One scale per channel."""
        return Scheme(type="fp8", num_bits=8, rule="compressed-tensors")

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """Scales are stored in the weight's dtype, as llm-compressor does."""
        return with_scale_dtype(scheme, weight_dtype)

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """E4M3 with one scale per row or per block of 128 x 128."""
        check_matrix(weight, self.name)
        check_scheme(weight, scheme, self.name, kind="fp8", blocks=(None, BLOCK))
        check_group_size(weight, scheme, self.name, allowed=(-1,))

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``weight`` and ``weight_scale``."""
        rows, columns = weight.shape
        shape = (rows, 1) if scheme.block is None else blocks_of(rows, columns, scheme.block)
        return (
            TensorSpec("weight", F8_E4M3, (rows, columns)),
            TensorSpec("weight_scale", scheme.scale_dtype or weight.dtype, shape),
        )

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """Yes per channel; a row of block scales belongs to 128 rows."""
        return scheme.block is None

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """The codes as they are."""
        return quantized.codes, stored_scale(quantized.scale, scale_dtype_of(scheme))

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """That of ``weight``."""
        rows, columns = tensors["weight"].shape
        return rows, columns

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """The codes as they are."""
        return Quantized(arrays["weight"], loaded_scale(arrays["weight_scale"]))

    def config_files(self, model: QuantizedModel) -> ConfigFiles:
        """One group for channels, one for blocks."""
        weight_only = activations_of(model, self.name, self.activations) == "none"
        return ct_config.write_config(model, LAYOUT, _weights, (lambda scheme: None) if weight_only else _inputs)

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with an FP8 ``weight``."""
        stored = modules_with(specs, "weight", (F8_E4M3,))
        return ct_config.read_config(config, specs, LAYOUT, stored, _scheme_of)


def _weights(scheme: Scheme) -> dict[str, Any]:
    if scheme.block is None:
        return ct_config.args(8, "float", "channel")
    return ct_config.args(8, "float", "block", block_structure=list(scheme.block))


def _inputs(scheme: Scheme) -> dict[str, Any]:
    if scheme.block is None:
        return ct_config.dynamic_args(8, "float")
    return ct_config.dynamic_args(8, "float", "group", group_size=scheme.block[1])


def _scheme_of(weights: ct_config.WeightArgs) -> Scheme:
    args, path = weights
    one_of(args, "type", ("float",), path)
    one_of(args, "num_bits", (8,), path, default=8)
    one_of(args, "symmetric", (True,), path, default=True)
    strategy = one_of(args, "strategy", ("channel", "block"), path)
    integer(args, "group_size", path, default=-1)
    block = block_size(args, "block_structure", path) if strategy == "block" else None
    return Scheme(type="fp8", num_bits=8, block=block, rule="compressed-tensors")

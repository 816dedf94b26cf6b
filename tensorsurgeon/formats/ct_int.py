"""compressed-tensors int-quantized: ``weight`` I8 [N, K], ``weight_scale`` [N, 1], activations per token at run time.

vLLM takes it for linears and experts alike (channel scales and dynamic token activations only). transformers 5.23
does not load it where experts are stored one by one (formats.md section 1.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tensorsurgeon.formats import ct_config
from tensorsurgeon.formats.base import ConfigFiles, QuantizedModel
from tensorsurgeon.formats.config_reading import modules_with, one_of
from tensorsurgeon.formats.coverage import activations_of
from tensorsurgeon.formats.scales import loaded_scale, scale_dtype_of, stored_scale, with_scale_dtype
from tensorsurgeon.formats.weight_checks import check_group_size, check_matrix, check_scheme
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import I8, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

LAYOUT = "int-quantized"


@dataclass(frozen=True, slots=True)
class CtInt:
    """W8A8: one symmetric scale per output channel, activations quantized per token while running."""

    name: ClassVar[str] = "ct_int"
    quant_method: ClassVar[str] = "compressed-tensors"
    activations: ClassVar[tuple[str, ...]] = ("dynamic",)

    def default_scheme(self) -> Scheme:
        """One symmetric scale per channel."""
        return Scheme(num_bits=8, rule="compressed-tensors")

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """Scales are stored in the weight's dtype, as llm-compressor does."""
        return with_scale_dtype(scheme, weight_dtype)

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """Any float matrix with one scale per row."""
        check_matrix(weight, self.name)
        check_scheme(weight, scheme, self.name)
        check_group_size(weight, scheme, self.name, allowed=(-1,))

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``weight`` and ``weight_scale`` [N, 1]."""
        rows, columns = weight.shape
        return (
            TensorSpec("weight", I8, (rows, columns)),
            TensorSpec("weight_scale", scheme.scale_dtype or weight.dtype, (rows, 1)),
        )

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """Yes: a row has its codes and its scale."""
        return True

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
        """One group, activations per token while running."""
        activations_of(model, self.name, self.activations)
        return ct_config.write_config(
            model,
            LAYOUT,
            weights=lambda scheme: ct_config.args(8, "int", "channel"),
            inputs=lambda scheme: ct_config.dynamic_args(8, "int"),
        )

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with an I8 ``weight``."""
        stored = modules_with(specs, "weight", (I8,))

        def scheme_of(weights: ct_config.WeightArgs) -> Scheme:
            one_of(weights.args, "num_bits", (8,), weights.path)
            one_of(weights.args, "type", ("int",), weights.path)
            one_of(weights.args, "strategy", ("channel",), weights.path, default="channel")
            one_of(weights.args, "symmetric", (True,), weights.path, default=True)
            return Scheme(num_bits=8, rule="compressed-tensors")

        return ct_config.read_config(config, specs, LAYOUT, stored, scheme_of)

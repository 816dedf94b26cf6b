"""Block FP8 as DeepSeek and Qwen publish it and transformers, vLLM and SGLang read it (``quant_method: fp8``).

``weight`` F8_E4M3 [N, K]; ``weight_scale_inv`` [ceil(N / 128), ceil(K / 128)], which despite its name is multiplied:
``w = weight * weight_scale_inv``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tensorsurgeon.formats.base import ConfigFiles, QuantizedModel
from tensorsurgeon.formats.config_reading import block_size, modules_with, one_of, schemes_of, strings
from tensorsurgeon.formats.coverage import activations_of, cover
from tensorsurgeon.formats.scales import loaded_scale, scale_dtype_of, stored_scale, with_scale_dtype
from tensorsurgeon.formats.weight_checks import BLOCK, blocks_of, check_group_size, check_matrix, check_scheme
from tensorsurgeon.models.experts import expert_list
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F8_E4M3, F32, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec


@dataclass(frozen=True, slots=True)
class HfFp8:
    """FP8 W8A8 with one scale per block, activations quantized while running; reads blocks of any size."""

    name: ClassVar[str] = "hf_fp8"
    quant_method: ClassVar[str] = "fp8"
    activations: ClassVar[tuple[str, ...]] = ("dynamic",)

    def default_scheme(self) -> Scheme:
        """Blocks of 128 x 128, the only ones that engines have kernels for."""
        return Scheme(type="fp8", num_bits=8, block=BLOCK, rule="compressed-tensors")

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """Scales are stored as F32, as in DeepSeek's checkpoints."""
        return with_scale_dtype(scheme, F32)

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """Any float matrix; blocks may be cut off at the edges."""
        check_matrix(weight, self.name)
        check_scheme(weight, scheme, self.name, kind="fp8", blocks=(BLOCK,), scale_dtypes=(F32, BF16))
        check_group_size(weight, scheme, self.name, allowed=(-1,))

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``weight`` and ``weight_scale_inv``."""
        rows, columns = weight.shape
        return (
            TensorSpec("weight", F8_E4M3, (rows, columns)),
            TensorSpec("weight_scale_inv", scheme.scale_dtype or F32, blocks_of(rows, columns, scheme.block or BLOCK)),
        )

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """No: a row of scales belongs to 128 rows of the weight."""
        return False

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """The codes as they are."""
        return quantized.codes, stored_scale(quantized.scale, scale_dtype_of(scheme))

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """That of ``weight``."""
        rows, columns = tensors["weight"].shape
        return rows, columns

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """The codes as they are."""
        return Quantized(arrays["weight"], loaded_scale(arrays["weight_scale_inv"]))

    def config_files(self, model: QuantizedModel) -> ConfigFiles:
        """Exceptions by exact name: readers of this dialect take no expressions.

        vLLM leaves a layer's experts alone where an entry contains ``<layer>.mlp.experts``.
        """
        activations_of(model, self.name, self.activations)
        coverage = cover(model)
        coverage.only_scheme(self.name)
        return ConfigFiles(
            {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "weight_block_size": list(BLOCK),
                "modules_to_not_convert": [*coverage.left_out(), *coverage.float_mtp],
            }
        )

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with an FP8 ``weight``; without a list of exceptions readers know the architecture's."""
        one_of(config, "fmt", ("e4m3",), default="e4m3")
        one_of(config, "activation_scheme", ("dynamic", "static"), default="dynamic")
        left = frozenset(strings(config, "ignored_layers") or strings(config, "modules_to_not_convert"))
        scheme = replace(self.default_scheme(), block=block_size(config, "weight_block_size"))

        def scheme_for(module: str) -> Scheme | None:
            return None if module in left or expert_list(module) in left else scheme

        return schemes_of(
            modules_with(specs, "weight", (F8_E4M3,)),
            specs,
            scheme_for,
            scale_name="weight_scale_inv",
            unquantized_key="modules_to_not_convert",
            float_by_tensors=not left,
        )

"""Block FP8 as DeepSeek and Qwen publish it and transformers, vLLM and SGLang read it (``quant_method: fp8``).

``weight`` F8_E4M3 [N, K]; ``weight_scale_inv`` [ceil(N / 128), ceil(K / 128)], which despite its name is multiplied:
``w = weight * weight_scale_inv``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from tensorsurgeon.formats.base import ConfigFiles, QuantizedModel, Word
from tensorsurgeon.formats.config_reading import TOP, block_size, modules_with, one_of, schemes_of, strings
from tensorsurgeon.formats.coverage import activations_of, cover
from tensorsurgeon.formats.plain import PlainCodes
from tensorsurgeon.formats.weight_checks import BLOCK
from tensorsurgeon.models.experts import expert_list
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16, F8_E4M3, F32, DType
from tensorsurgeon.tensors.spec import SpecMap


class HfFp8(PlainCodes):
    """FP8 W8A8 with one scale per block, stored as F32 as in DeepSeek's checkpoints; reads blocks of any size.

    Activations are quantized while running.
    """

    __slots__ = ()
    name: ClassVar[str] = "hf-fp8"
    quant_method: ClassVar[str] = "fp8"
    words: ClassVar[tuple[str, ...]] = ("e4m3",)
    activations: ClassVar[tuple[str, ...]] = ("dynamic",)
    codes: ClassVar[DType] = F8_E4M3
    # The only blocks that engines have kernels for.
    default: ClassVar[Scheme] = Scheme(type="fp8", num_bits=8, block=BLOCK, rule="compressed-tensors")
    scale_name: ClassVar[str] = "weight_scale_inv"
    stored_as: ClassVar[DType | None] = F32
    scale_dtypes: ClassVar[tuple[DType, ...]] = (F32, BF16)
    blocks: ClassVar[tuple[tuple[int, int] | None, ...]] = (BLOCK,)

    @staticmethod
    def word_in(config: Mapping[str, Any], specs: SpecMap) -> Word:
        """``fmt``."""
        return Word(f"{TOP}.fmt", (config.get("fmt") or "e4m3",))

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

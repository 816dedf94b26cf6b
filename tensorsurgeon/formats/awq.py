"""AWQ, version GEMM: 4 bits with zero points, as AutoAWQ stores it and vLLM, SGLang and transformers read it.

Symmetric weights are written with the zero point 8 and ``zero_point: true``: vLLM's type is uint4 with zero points,
and without them it would read the codes as they are, eight too high.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from tensorsurgeon.errors import SpecError
from tensorsurgeon.formats.awq_words import awq_tensors, awq_weight_shape, pack_awq, unpack_awq
from tensorsurgeon.formats.base import ConfigFiles, Format, QuantizedModel, Word
from tensorsurgeon.formats.config_reading import TOP, boolean, integer, modules_with, one_of, schemes_of, strings
from tensorsurgeon.formats.coverage import Coverage, activations_of, cover
from tensorsurgeon.formats.scales import with_scale_dtype
from tensorsurgeon.formats.weight_checks import check_group_size, check_matrix, check_multiple, check_scheme
from tensorsurgeon.models.fused import fused_name
from tensorsurgeon.models.mtp import MTP_WORD, head_paths
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F16, I32, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec


@dataclass(frozen=True, slots=True)
class Awq(Format):
    """W4A16 in groups or per channel."""

    name: ClassVar[str] = "awq"
    quant_method: ClassVar[str] = "awq"
    words: ClassVar[tuple[str, ...]] = ("gemm", "GEMM")
    activations: ClassVar[tuple[str, ...]] = ("none",)

    @staticmethod
    def word_in(config: Mapping[str, Any], specs: SpecMap) -> Word:
        """``version``; without it, GEMM."""
        return Word(f"{TOP}.version", (config.get("version") or "gemm",))

    def default_scheme(self) -> Scheme:
        """Asymmetric, in groups of 128, as AutoAWQ does it."""
        return Scheme(num_bits=4, group_size=128, symmetric=False, rule="awq")

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """Scales are stored as F16, whatever the weight's dtype."""
        return with_scale_dtype(scheme, F16)

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """4 bits; outputs in whole words."""
        check_matrix(weight, self.name)
        check_scheme(weight, scheme, self.name, num_bits=(4,), symmetric=(True, False), scale_dtypes=(F16,))
        check_group_size(weight, scheme, self.name)
        check_multiple(weight, self.name, out=8, why="whole words of codes")

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``qweight``, ``qzeros`` and ``scales``."""
        return awq_tensors(weight, scheme)

    def local_names(self, scheme: Scheme) -> tuple[str, ...]:
        """As ``tensors`` has them."""
        return "qweight", "qzeros", "scales"

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """No: rows of the weight are columns here."""
        return False

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """Interleaved words; NumericError where a scale overflows F16."""
        return pack_awq(quantized, scheme)

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """From the words and the scales."""
        return awq_weight_shape(tensors)

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """The inverse of ``pack``."""
        return unpack_awq(arrays, scheme)

    def config_files(self, model: QuantizedModel) -> ConfigFiles:
        """One scheme; ``sym`` is there for readers of our own, all others take the zero points."""
        activations_of(model, self.name, self.activations)
        coverage = cover(model)
        scheme = coverage.only_scheme(self.name)
        return ConfigFiles(
            {
                "quant_method": "awq",
                "version": "gemm",
                "bits": 4,
                "group_size": scheme.group_size,
                "zero_point": True,
                "sym": scheme.symmetric,
                "lm_head": "lm_head" in coverage.linears,
                "modules_to_not_convert": modules_to_not_convert(coverage),
            }
        )

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with a ``qweight``; without a list of exceptions readers look at the tensors."""
        one_of(config, "bits" if "bits" in config else "w_bit", (4,))
        one_of(config, "version", ("gemm", "GEMM"), default="gemm")
        one_of(config, "zero_point", (True,))
        scheme = Scheme(
            num_bits=4,
            group_size=integer(config, "group_size" if "group_size" in config else "q_group_size"),
            symmetric=boolean(config, "sym", default=False),
            rule="awq",
        )
        left = strings(config, "modules_to_not_convert")
        return schemes_of(
            modules_with(specs, "qweight", (I32,)),
            specs,
            lambda module: None if any(text in module for text in left) else scheme,
            scale_name="scales",
            unquantized_key="modules_to_not_convert",
            float_by_tensors=not left,
        )


def modules_to_not_convert(coverage: Coverage) -> list[str]:
    """Substrings of the names of everything unquantized, and of nothing else.

    vLLM and SGLang look for them in their own names, fused ones included: ``mlp.gate`` would hit a dense layer's
    ``mlp.gate_up_proj``. Each is as short as that allows: a whole tower, a module of every layer, of one layer.
    """
    quantized = coverage.quantized_names()
    quantized += [*coverage.experts, *(f for module in quantized if (f := fused_name(module)) is not None)]
    left = [*coverage.left_out(), *(f for module in coverage.float_linears if (f := fused_name(module)) is not None)]

    @cache
    def hit(text: str) -> str | None:
        return next((name for name in quantized if text in name), None)

    found = dict.fromkeys(_first_unused(_candidates(module), hit, module) for module in left)
    for path in head_paths(coverage.float_mtp):
        found[_first_unused((path if path == MTP_WORD else f"{path}.",), hit, coverage.float_mtp[0])] = None
    return [text for text in found if not any(other != text and other in text for other in found)]


def _candidates(module: str) -> tuple[str, ...]:
    parts = module.removeprefix("model.").split(".")
    numbered = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    if numbered is None:
        return parts[0], ".".join(parts), module
    tower, of_all_layers, of_one = parts[: numbered - 1], parts[numbered + 1 :], parts[numbered - 1 :]
    return *tower[:1], ".".join(of_all_layers), ".".join(of_one), module


def _first_unused(candidates: Iterable[str], hit: Callable[[str], str | None], module: str) -> str:
    found: str | None = None
    for text in candidates:
        found = hit(text)
        if found is None:
            return text
    raise SpecError(
        f"{module} is not quantized, but modules_to_not_convert takes substrings and its name is part of {found}; "
        "quantize it too, or choose another format"
    )

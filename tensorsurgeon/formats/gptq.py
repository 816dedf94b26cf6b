"""GPTQ as GPTQModel and AutoGPTQ store it, read by vLLM (``auto_gptq``), SGLang and transformers.

``qweight``, ``qzeros`` and ``scales`` as in ``gptq_words``, and ``g_idx`` I32 [K], the group of each input, which is
``k // group_size`` here. vLLM 0.33 drops it and ignores ``qzeros`` (4 and 8 bits, symmetric only); GPTQModel's own
reader has a buffer for it, so it is written unless ``g_idx`` is false.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np

from tensorsurgeon.errors import ConfigError, SpecError
from tensorsurgeon.formats.base import ConfigFiles, Format, QuantizedModel, Word
from tensorsurgeon.formats.config_reading import TOP, boolean, integer, modules_with, one_of, schemes_of
from tensorsurgeon.formats.coverage import activations_of, cover
from tensorsurgeon.formats.gptq_dynamic import DynamicRules, base_scheme, dynamic_rules
from tensorsurgeon.formats.gptq_words import (
    check_group_index,
    gptq_tensors,
    gptq_weight_shape,
    group_index,
    pack_gptq,
    refuse_zero_points_of_zero,
    unpack_gptq,
)
from tensorsurgeon.formats.scales import with_scale_dtype
from tensorsurgeon.formats.weight_checks import check_group_size, check_matrix, check_multiple, check_scheme
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F16, I32, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec
from tensorsurgeon.version import __version__

_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Gptq(Format):
    """W2A16 to W8A16 in the words of GPTQ v1 (``gptq``: zero points minus one) or v2 (``gptq_v2``)."""

    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    g_idx: bool = True
    # Whether v1's "minus one" was done on whole words, as GPTQModel does; others do it on each field.
    whole_words: bool = True

    name: ClassVar[str] = "gptq"
    optional: ClassVar[frozenset[str]] = frozenset({"g_idx"})
    quant_method: ClassVar[str] = "gptq"
    words: ClassVar[tuple[str, ...]] = ("gptq", "gptq_v2")
    activations: ClassVar[tuple[str, ...]] = ("none",)

    @staticmethod
    def word_in(config: Mapping[str, Any], specs: SpecMap) -> Word:
        """``checkpoint_format``; without it, v1."""
        return Word(f"{TOP}.checkpoint_format", (config.get("checkpoint_format") or "gptq",))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], specs: SpecMap) -> Self:
        """v1 or v2, with or without ``g_idx``; who wrote it is what ``meta.quantizer`` says."""
        is_v2 = config.get("checkpoint_format") == "gptq_v2"
        meta = config.get("meta")
        writer = str(meta.get("quantizer")).lower() if isinstance(meta, Mapping) else ""
        return cls(
            "gptq_v2" if is_v2 else "gptq",
            g_idx=any(name.endswith(".g_idx") for name in specs),
            whole_words="gptqmodel" in writer or "tensorsurgeon" in writer,
        )

    def default_scheme(self) -> Scheme:
        """W4A16 in groups of 128."""
        return Scheme(num_bits=4, group_size=128, rule="gptq")

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """Scales are stored as F16, whatever the weight's dtype."""
        return with_scale_dtype(scheme, F16)

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """Multiples of 32 both ways, as GPTQModel demands; asymmetric weights in v2 only."""
        check_matrix(weight, self.name)
        check_scheme(weight, scheme, self.name, num_bits=_BITS, symmetric=(True, False), scale_dtypes=(F16, BF16))
        check_group_size(weight, scheme, self.name)
        check_multiple(weight, self.name, out=32, inputs=32, why="whole words of codes and zero points")
        if not scheme.symmetric and self.checkpoint_format == "gptq":
            raise SpecError(
                f"{weight.name}: GPTQ v1 stores zero points minus one and so has no room for 0, which readers carry "
                "into the next zero point; write asymmetric weights in the format gptq-v2"
            )

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``qweight``, ``qzeros``, ``scales`` and ``g_idx``."""
        index = (TensorSpec("g_idx", I32, (weight.shape[1],)),) if self.g_idx else ()
        return (*gptq_tensors(weight, scheme), *index)

    def local_names(self, scheme: Scheme) -> tuple[str, ...]:
        """As ``tensors`` has them."""
        return "qweight", "qzeros", "scales", *(("g_idx",) if self.g_idx else ())

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """No: rows of the weight are columns here."""
        return False

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """Transposed words; NumericError where a scale overflows F16."""
        columns = quantized.codes.shape[1]
        size = columns if scheme.group_size == -1 else scheme.group_size
        index = (group_index(columns, size),) if self.g_idx else ()
        return (*pack_gptq(quantized, scheme, self.checkpoint_format == "gptq"), *index)

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """From the scales and, per channel, from the words."""
        return gptq_weight_shape(tensors, scheme)

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """CheckpointError for a ``g_idx`` in any other order than the inputs'."""
        if "g_idx" in arrays:
            check_group_index(arrays["g_idx"], scheme)
        is_v1 = self.checkpoint_format == "gptq"
        if is_v1 and not scheme.symmetric and not self.whole_words:
            refuse_zero_points_of_zero(arrays["qzeros"], scheme, arrays["qweight"].shape[1])
        return unpack_gptq(arrays, scheme, is_v1)

    def config_files(self, model: QuantizedModel) -> ConfigFiles:
        """``quantization_config`` and the same content as ``quantize_config.json``, which older readers look for."""
        activations_of(model, self.name, self.activations)
        coverage = cover(model)
        base = base_scheme(coverage)
        config = {
            "quant_method": "gptq",
            "method": "gptq",
            "checkpoint_format": self.checkpoint_format,
            "format": self.checkpoint_format,
            "bits": base.num_bits,
            "group_size": base.group_size,
            "sym": base.symmetric,
            "desc_act": False,
            "lm_head": "lm_head" in coverage.linears,
            "pack_dtype": "int32",
            "dynamic": dynamic_rules(coverage),
            "meta": {"quantizer": [f"tensorsurgeon:{__version__}"]},
        }
        return ConfigFiles(config, {"quantize_config.json": config})

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with a ``qweight``; what else is float needs no rule, for readers look at the tensors."""
        layout = one_of(config, "checkpoint_format", ("gptq", "gptq_v2"), default=self.checkpoint_format)
        if layout != self.checkpoint_format:
            raise ConfigError(f"{TOP}.checkpoint_format: found {layout!r}, expected {self.checkpoint_format!r}")
        base = Scheme(
            num_bits=one_of(config, "bits", _BITS),
            group_size=integer(config, "group_size"),
            symmetric=boolean(config, "sym", default=True),
            rule="gptq",
        )
        meta = config.get("meta")
        static = config.get("static_groups") or (meta.get("static_groups") if isinstance(meta, Mapping) else None)
        if boolean(config, "desc_act", default=False) and base.group_size != -1 and not static:
            raise ConfigError(f"{TOP}.desc_act: found true; weights in activation order cannot be read")
        one_of(config, "pack_dtype", ("int32",), default="int32")
        rules = DynamicRules(config.get("dynamic"), base)
        stored = modules_with(specs, "qweight", (I32,))
        return schemes_of(stored, specs, rules.scheme_for, scale_name="scales", unquantized_key="dynamic", float_by_tensors=True)

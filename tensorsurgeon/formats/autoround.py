"""AutoRound: the words of GPTQ v1 or of AWQ under a config of its own.

Scales are F16 and signed: AutoRound maps the extreme of a group to the code -8 exactly, with a negative scale where
that extreme is positive. Nothing that reads or checks them may assume that they are positive.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal, Self

import numpy as np

from tensorsurgeon.errors import ConfigError, SpecError
from tensorsurgeon.formats.awq_words import awq_tensors, awq_weight_shape, pack_awq, unpack_awq
from tensorsurgeon.formats.base import ConfigFiles, Format, QuantizedModel, Word
from tensorsurgeon.formats.config_reading import TOP, boolean, integer, modules_with, one_of, schemes_of, strings
from tensorsurgeon.formats.coverage import Coverage, activations_of, cover
from tensorsurgeon.formats.gptq_dynamic import base_scheme
from tensorsurgeon.formats.gptq_words import (
    check_group_index,
    gptq_tensors,
    gptq_weight_shape,
    pack_gptq,
    unpack_gptq,
)
from tensorsurgeon.formats.scales import with_scale_dtype
from tensorsurgeon.formats.weight_checks import check_group_size, check_matrix, check_multiple, check_scheme
from tensorsurgeon.models.experts import expert_list
from tensorsurgeon.models.fused import fused_name
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F16, I32, DType
from tensorsurgeon.tensors.expressions import Expression
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec
from tensorsurgeon.version import __version__

GPTQ_V1: Final = "auto_round:auto_gptq"
AWQ: Final = "auto_round:auto_awq"
PACKINGS: Final = (GPTQ_V1, AWQ, "auto_round", "auto_round:gptqmodel")
"""The last two store zero points as they are; AutoRound reads them, vLLM does not."""

_FLOAT: Final = {"bits": 16, "data_type": "float"}
_REGEX_CHARACTERS: Final = frozenset(r"*+?^$()[]{}|\\")


@dataclass(frozen=True, slots=True)
class AutoRound(Format):
    """W2A16 to W8A16 (4 bits for AWQ's words)."""

    packing_format: Literal["auto_round:auto_gptq", "auto_round:auto_awq", "auto_round", "auto_round:gptqmodel"] = (
        "auto_round:auto_gptq"
    )

    name: ClassVar[str] = "autoround"
    quant_method: ClassVar[str] = "auto-round"
    words: ClassVar[tuple[str, ...]] = PACKINGS
    activations: ClassVar[tuple[str, ...]] = ("none",)

    @staticmethod
    def word_in(config: Mapping[str, Any], specs: SpecMap) -> Word:
        """``packing_format``; without it, GPTQ v1."""
        return Word(f"{TOP}.packing_format", (config.get("packing_format") or GPTQ_V1,))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], specs: SpecMap) -> Self:
        """With the packing that the config names."""
        return cls(one_of(config, "packing_format", PACKINGS, default=GPTQ_V1))

    def default_scheme(self) -> Scheme:
        """W4A16 in groups of 128, scales signed."""
        return Scheme(num_bits=4, group_size=128, rule="autoround")

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """Scales are stored as F16, whatever the weight's dtype."""
        return with_scale_dtype(scheme, F16)

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """Multiples of 32 both ways, as AutoRound demands of what it quantizes."""
        check_matrix(weight, self.name)
        bits = (4,) if self.packing_format == AWQ else (2, 3, 4, 8)
        check_scheme(weight, scheme, self.name, num_bits=bits, symmetric=(True, False), scale_dtypes=(F16,))
        check_group_size(weight, scheme, self.name)
        check_multiple(weight, self.name, out=32, inputs=32, why="whole words of codes and zero points")
        if not scheme.symmetric and self.packing_format == GPTQ_V1:
            raise SpecError(
                f"{weight.name}: {GPTQ_V1} stores zero points minus one and so has no room for 0; write asymmetric "
                "weights in the format autoround-awq"
            )

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``qweight``, ``qzeros`` and ``scales``; no ``g_idx``."""
        return awq_tensors(weight, scheme) if self.packing_format == AWQ else gptq_tensors(weight, scheme)

    def local_names(self, scheme: Scheme) -> tuple[str, ...]:
        """As ``tensors`` has them."""
        return "qweight", "qzeros", "scales"

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """No: rows of the weight are columns here."""
        return False

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """Negative scales stay negative; NumericError where one overflows F16."""
        if self.packing_format == AWQ:
            return pack_awq(quantized, scheme)
        return pack_gptq(quantized, scheme, self.packing_format == GPTQ_V1)

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """From the words and the scales."""
        return awq_weight_shape(tensors) if self.packing_format == AWQ else gptq_weight_shape(tensors, scheme)

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """The inverse of ``pack``."""
        if self.packing_format == AWQ:
            return unpack_awq(arrays, scheme)
        if "g_idx" in arrays:
            check_group_index(arrays["g_idx"], scheme)
        return unpack_gptq(arrays, scheme, self.packing_format == GPTQ_V1)

    def config_files(self, model: QuantizedModel) -> ConfigFiles:
        """``quantization_config`` and the same content as ``quantization_config.json``."""
        activations_of(model, self.name, self.activations)
        coverage = cover(model)
        base = base_scheme(coverage)
        blocks = block_names(coverage)
        config = {
            "quant_method": "auto-round",
            "packing_format": self.packing_format,
            "bits": base.num_bits,
            "group_size": base.group_size,
            "sym": base.symmetric,
            "data_type": "int",
            "iters": 0,
            # Readers compare this with versions whose layouts differ; ours is the layout of 0.14 and later.
            "autoround_version": "0.14.0",
            "provider": f"tensorsurgeon:{__version__}",
            "block_name_to_quantize": ",".join(blocks),
            "extra_config": extra_config(coverage, base, blocks),
        }
        return ConfigFiles(config, {"quantization_config.json": config})

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with a ``qweight``, inside the blocks or named in ``extra_config``."""
        packing = one_of(config, "packing_format", PACKINGS, default=self.packing_format)
        if packing != self.packing_format:
            raise ConfigError(f"{TOP}.packing_format: found {packing!r}, expected {self.packing_format!r}")
        one_of(config, "data_type", ("int",), default="int")
        reader = _Reader(config)
        return schemes_of(
            modules_with(specs, "qweight", (I32,)),
            specs,
            reader.scheme_for,
            scale_name="scales",
            unquantized_key="extra_config",
        )


def block_names(coverage: Coverage) -> list[str]:
    """The lists of layers that hold quantized modules (``model.language_model.layers``), in file order."""
    names: dict[str, None] = {}
    for module in (*coverage.linears, *coverage.experts):
        block = _block_of(module)
        if block is not None:
            names[block] = None
    return list(names)


def extra_config(coverage: Coverage, base: Scheme, blocks: list[str]) -> dict[str, dict[str, Any]]:
    """What differs from the rest: float linears inside the blocks, other schemes, quantized modules outside.

    Readers take everything inside the blocks for quantized and everything outside for float. Old engines look for
    the fused name of ``in_proj_b`` and ``in_proj_a``, so float siblings get an entry for it too.
    """
    entries: dict[str, dict[str, Any]] = {}
    for module in (*coverage.float_linears, *coverage.float_experts, *coverage.float_mtp):
        if not module.startswith(tuple(blocks)):
            continue
        entries[module] = dict(_FLOAT)
        fused = fused_name(module)
        if fused is not None:
            entries[fused] = dict(_FLOAT)
    for scheme, modules in coverage.schemes().items():
        values = {"bits": scheme.num_bits, "group_size": scheme.group_size, "sym": scheme.symmetric, "data_type": "int"}
        for module in modules:
            if scheme == base and _block_of(module) is not None:
                continue
            if module in coverage.experts:
                raise SpecError(f"{module}: AutoRound's readers take one scheme for the experts of all layers")
            entries[module] = dict(values)
    return entries


def _block_of(module: str) -> str | None:
    found = re.match(r"(.*?)\.\d+\.", module)
    return None if found is None else found[1]


class _Reader:
    """``block_name_to_quantize`` and ``extra_config`` as AutoRound and vLLM resolve them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.base = Scheme(
            num_bits=one_of(config, "bits", (2, 3, 4, 8)),
            group_size=integer(config, "group_size"),
            symmetric=boolean(config, "sym", default=True),
            rule="autoround",
        )
        blocks = config.get("block_name_to_quantize") or config.get("to_quant_block_names")
        if isinstance(blocks, str):
            self.blocks = tuple(name.strip() for name in blocks.split(","))
        else:
            key = "block_name_to_quantize" if config.get("block_name_to_quantize") else "to_quant_block_names"
            self.blocks = strings(config, key)
        extra = config.get("extra_config") or {}
        if not isinstance(extra, Mapping):
            raise ConfigError(f"{TOP}.extra_config: expected a mapping, found {extra!r}")
        self.exact = {key: self._scheme(key, values) for key, values in extra.items()}
        self.expressions = [
            (Expression.of_config(key), scheme) for key, scheme in self.exact.items() if set(key) & _REGEX_CHARACTERS
        ]

    def _scheme(self, key: str, values: Mapping[str, Any]) -> Scheme | None:
        path = f"{TOP}.extra_config.{key}"
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path}: expected a mapping, found {values!r}")
        bits = integer(values, "bits", path, default=self.base.num_bits)
        if bits >= 16:
            return None
        return replace(
            self.base,
            num_bits=bits,
            group_size=integer(values, "group_size", path, default=self.base.group_size),
            symmetric=boolean(values, "sym", path, default=self.base.symmetric),
        )

    def scheme_for(self, module: str) -> Scheme | None:
        """None outside the blocks and where ``extra_config`` says 16 bits."""
        if module in self.exact:
            return self.exact[module]
        for pattern, scheme in self.expressions:
            if pattern.search(module):
                return scheme
        experts = expert_list(module)
        if experts in self.exact:
            return self.exact[experts]
        return self.base if not self.blocks or module.startswith(self.blocks) else None

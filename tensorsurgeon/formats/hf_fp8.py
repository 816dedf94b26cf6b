"""Block FP8 as DeepSeek and Qwen publish it and transformers, vLLM and SGLang read it (``quant_method: fp8``).

``weight`` F8_E4M3 [N, K]; ``weight_scale_inv`` [ceil(N / 128), ceil(K / 128)], which despite its name is multiplied:
``w = weight * weight_scale_inv``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal, Self, get_args

from tensorsurgeon.errors import ConfigError
from tensorsurgeon.formats.base import ConfigFiles, QuantizedModel, Word
from tensorsurgeon.formats.config_reading import TOP, block_size, modules_with, one_of, schemes_of, strings
from tensorsurgeon.formats.coverage import activations_of, cover
from tensorsurgeon.formats.kept_out import KeptOut
from tensorsurgeon.formats.plain import PlainCodes
from tensorsurgeon.formats.weight_checks import BLOCK
from tensorsurgeon.models.experts import expert_list
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16, F8_E4M3, F32, I8, DType
from tensorsurgeon.tensors.spec import SpecMap

Names = Literal["weight_scale_inv", "weight_scale", "scale"]
_NAMES: Final[tuple[Names, ...]] = get_args(Names)


@dataclass(frozen=True, slots=True)
class HfFp8(PlainCodes):
    """FP8 W8A8 with one scale per block, stored as F32 as in DeepSeek's checkpoints; activations quantized while running.

    Reads blocks of any size, one scale per channel, and one for the whole weight (whose static ``activation_scale`` is
    no part of the weight), also where the scales are called ``weight_scale`` or ``scale`` (DeepSeek V4).
    """

    scales: Names = "weight_scale_inv"

    name: ClassVar[str] = "hf-fp8"
    quant_method: ClassVar[str] = "fp8"
    words: ClassVar[tuple[str, ...]] = ("e4m3", "float8_e4m3fn")
    activations: ClassVar[tuple[str, ...]] = ("dynamic",)
    codes: ClassVar[DType] = F8_E4M3
    # The only blocks that engines have kernels for.
    default: ClassVar[Scheme] = Scheme(type="fp8", num_bits=8, block=BLOCK, rule="compressed-tensors")
    stored_as: ClassVar[DType | None] = F32
    scale_dtypes: ClassVar[tuple[DType, ...]] = (F32, BF16)
    blocks: ClassVar[tuple[tuple[int, int] | None, ...]] = (BLOCK,)

    @property
    def scale_name(self) -> str:  # type: ignore[override]
        """``scales``, which the file decides."""
        return self.scales

    @staticmethod
    def word_in(config: Mapping[str, Any], specs: SpecMap) -> Word:
        """``fmt``, and ``fp4`` where bytes of two codes lie beside FP8."""
        packed = any(s.dtype is I8 and s.name.endswith(".weight") and f"{s.module}.scale" in specs for s in specs.values())
        return Word(f"{TOP}.fmt", (config.get("fmt") or "e4m3", *(("fp4",) if packed else ())))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], specs: SpecMap) -> Self:
        """With the name that the scales of FP8 weights have."""
        weights = modules_with(specs, "weight", (F8_E4M3,))
        return cls(next((name for name in _NAMES for module in weights if f"{module}.{name}" in specs), _NAMES[0]))

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
        """Modules with an FP8 ``weight``; without a list of exceptions readers know the architecture's.

        Without a block size the scales say themselves whether there is one per channel or one for the weight.
        """
        one_of(config, "fmt", self.words, default="e4m3")
        one_of(config, "activation_scheme", ("dynamic", "static"), default="dynamic")
        left = KeptOut(strings(config, "ignored_layers") or strings(config, "modules_to_not_convert"))
        in_blocks = config.get("weight_block_size") is not None
        scheme = replace(self.default, block=block_size(config, "weight_block_size") if in_blocks else None)
        whole = replace(scheme, block=None, group_size=0)

        def scheme_for(module: str) -> Scheme | None:
            if module in left or expert_list(module) in left.plain:
                return None
            scale = specs.get(f"{module}.{self.scales}")
            if in_blocks or scale is None:
                return scheme
            if scale.numel not in (1, specs[f"{module}.weight"].shape[0]):
                raise ConfigError(f"{TOP}.weight_block_size: expected [rows, columns], for {scale} are scales of blocks")
            return whole if scale.numel == 1 else scheme

        return schemes_of(
            modules_with(specs, "weight", (F8_E4M3,)),
            specs,
            scheme_for,
            scale_name=self.scales,
            unquantized_key="modules_to_not_convert",
            float_by_tensors=not left,
        )

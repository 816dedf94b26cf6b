"""ModelOpt FP8: ``weight`` F8_E4M3 [N, K] and ``weight_scale``, one for the weight, one per channel or one per block.

``w = weight * weight_scale``. Block scales lie as [N/128, 1, K/128, 1]. ``input_scale`` is that of static activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tensorsurgeon.formats import modelopt_config
from tensorsurgeon.formats.config_reading import modules_with
from tensorsurgeon.formats.plain import PlainCodes
from tensorsurgeon.formats.read_only import ReadOnly
from tensorsurgeon.formats.weight_checks import BLOCK
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import F8_E4M3, F32, DType
from tensorsurgeon.tensors.spec import SpecMap

_BLOCKS, _CHANNELS = "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN"


class ModelOptFp8(ReadOnly, PlainCodes):
    """FP8 weights, static or dynamic activations."""

    __slots__ = ()
    name: ClassVar[str] = "modelopt-fp8"
    quant_method: ClassVar[str] = "modelopt"
    words: ClassVar[tuple[str, ...]] = ("FP8", _CHANNELS, _BLOCKS)
    activations: ClassVar[tuple[str, ...]] = ("dynamic",)
    codes: ClassVar[DType] = F8_E4M3
    default: ClassVar[Scheme] = Scheme(type="fp8", num_bits=8, group_size=0, rule="compressed-tensors")
    stored_as: ClassVar[DType | None] = F32
    word_in = staticmethod(modelopt_config.word_in)

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with an FP8 ``weight``; the shape of its scales says how many weights share one."""
        stored = modules_with(specs, "weight", (F8_E4M3,))
        whole = self.default
        channels = Scheme(type="fp8", num_bits=8, rule="compressed-tensors")
        blocks = Scheme(type="fp8", num_bits=8, block=BLOCK, rule="compressed-tensors")

        def scheme_for(module: str) -> Scheme:
            scale = specs.get(f"{module}.weight_scale")
            if scale is None or scale.numel == 1:
                return whole
            return channels if scale.numel == specs[f"{module}.weight"].shape[0] else blocks

        return modelopt_config.read_config(config, specs, stored, self.words, scheme_for)

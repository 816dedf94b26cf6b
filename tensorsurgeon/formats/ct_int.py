"""compressed-tensors int-quantized: ``weight`` I8 [N, K], ``weight_scale`` [N, 1], activations per token at run time.

vLLM takes it for linears and experts alike (channel scales and dynamic token activations only). transformers 5.23
does not load it where experts are stored one by one (formats.md section 1.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tensorsurgeon.formats import ct_config
from tensorsurgeon.formats.config_reading import modules_with, one_of
from tensorsurgeon.formats.ct_config import CtFormat, GroupArgs
from tensorsurgeon.formats.plain import PlainCodes
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import I8, DType
from tensorsurgeon.tensors.spec import SpecMap

LAYOUT = "int-quantized"


class CtInt(CtFormat, PlainCodes):
    """W8A8: one symmetric scale per output channel, in the weight's dtype as llm-compressor stores it."""

    __slots__ = ()
    name: ClassVar[str] = "ct-int"
    words: ClassVar[tuple[str, ...]] = (LAYOUT,)
    activations: ClassVar[tuple[str, ...]] = ("dynamic",)
    codes: ClassVar[DType] = I8
    default: ClassVar[Scheme] = Scheme(num_bits=8, rule="compressed-tensors")

    def group_args(self, activations: str) -> GroupArgs:
        """Activations per token while running."""
        return GroupArgs(LAYOUT, lambda s: ct_config.args(8, "int", "channel"), lambda s: ct_config.dynamic_args(8, "int"))

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with an I8 ``weight``."""
        return ct_config.read_config(config, specs, LAYOUT, modules_with(specs, "weight", (I8,)), _scheme_of)


def _scheme_of(weights: ct_config.WeightArgs) -> Scheme:
    one_of(weights.args, "num_bits", (8,), weights.path)
    one_of(weights.args, "type", ("int",), weights.path)
    one_of(weights.args, "strategy", ("channel",), weights.path, default="channel")
    one_of(weights.args, "symmetric", (True,), weights.path, default=True)
    return Scheme(num_bits=8, rule="compressed-tensors")

"""compressed-tensors float-quantized: FP8 (E4M3) weights with a scale per channel or per 128 x 128 block.

``weight`` F8_E4M3 [N, K]; ``weight_scale`` [N, 1], or [ceil(N / 128), ceil(K / 128)] for blocks, which may be cut
off at the lower and right edge. ``w = weight * weight_scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tensorsurgeon.formats import ct_config
from tensorsurgeon.formats.config_reading import block_size, integer, modules_with, one_of
from tensorsurgeon.formats.ct_config import CtFormat, GroupArgs
from tensorsurgeon.formats.plain import PlainCodes
from tensorsurgeon.formats.weight_checks import BLOCK
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import F8_E4M3, DType
from tensorsurgeon.tensors.spec import SpecMap

LAYOUT = "float-quantized"


class CtFloat(CtFormat, PlainCodes):
    """FP8 W8A8, activations quantized while running: per token beside channels, per 128 inputs beside blocks.

    With ``activations: none`` the config asks for W8A16. Scales are in the weight's dtype, as llm-compressor stores
    them.
    """

    __slots__ = ()
    name: ClassVar[str] = "ct-float"
    words: ClassVar[tuple[str, ...]] = (LAYOUT,)
    activations: ClassVar[tuple[str, ...]] = ("dynamic", "none")
    codes: ClassVar[DType] = F8_E4M3
    default: ClassVar[Scheme] = Scheme(type="fp8", num_bits=8, rule="compressed-tensors")
    blocks: ClassVar[tuple[tuple[int, int] | None, ...]] = (None, BLOCK)

    def group_args(self, activations: str) -> GroupArgs:
        """One group for channels, one for blocks."""
        return GroupArgs(LAYOUT, _weights, (lambda scheme: None) if activations == "none" else _inputs)

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with an FP8 ``weight``."""
        return ct_config.read_config(config, specs, LAYOUT, modules_with(specs, "weight", (F8_E4M3,)), _scheme_of)


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
    strategy = one_of(args, "strategy", ("channel", "block", "tensor"), path)
    integer(args, "group_size", path, default=-1)
    block = block_size(args, "block_structure", path) if strategy == "block" else None
    # One scale for the whole weight is read, never written.
    group_size = 0 if strategy == "tensor" else -1
    return Scheme(type="fp8", num_bits=8, group_size=group_size, block=block, rule="compressed-tensors")

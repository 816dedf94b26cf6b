"""What a quantized weight is: the scheme that chooses codes, and the codes with their scales.

A scheme says which codes exist and by which tool's rule the scales and codes come from the weight; it knows
nothing of names or packing, which are the formats' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np

from tensorsurgeon.tensors.dtypes import DType

Rule = Literal["compressed-tensors", "quark", "gptq", "autoround", "awq"]

RULES: Final[tuple[Rule, ...]] = ("compressed-tensors", "quark", "gptq", "autoround", "awq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Which codes exist, how weights are grouped, and whose rounding is followed.

    ``type``: ``int`` (two's complement of ``num_bits``), ``fp8`` (E4M3), ``nvfp4`` (E2M1, groups of 16 with E4M3
    scales and a global scale) or ``mxfp4`` (E2M1, groups of 32 with E8M0 scales).
    ``group_size``: inputs per scale along a row, the last group may be short; -1 is one scale per output channel, 0
    one scale for the whole weight (read, never written).
    ``block``: rows x columns per scale (FP8 128 x 128); excludes ``group_size``.
    ``rule``: the tool whose scales and rounding are matched to the bit (formats.md section 0).
    ``signed``: of a group of a symmetric integer grid the value of largest magnitude becomes the code ``qmin``, whatever its
    sign: the scale is negative where that value is positive, and every code is used. None is as ``rule`` has it.
    ``scale_dtype``: what the format stores; scales are rounded to it before codes are chosen where the tool does so.
    ``clip_search``: minimise the squared error over a range of scales; never the default, for no tool does it.
    """

    type: Literal["int", "fp8", "nvfp4", "mxfp4"] = "int"
    num_bits: int = 8
    symmetric: bool = True
    group_size: int = -1
    block: tuple[int, int] | None = None
    rule: Rule = "compressed-tensors"
    signed: bool | None = None
    scale_dtype: DType | None = None
    clip_search: bool = False

    @property
    def qmin(self) -> int:
        return -(1 << (self.num_bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.num_bits - 1)) - 1

    @property
    def has_signed_scales(self) -> bool:
        """Whether scales carry the sign of their group's extreme value."""
        by_rule = self.rule in ("autoround", "awq")
        return self.type == "int" and self.symmetric and (by_rule if self.signed is None else self.signed)

    def groups(self, in_features: int) -> int:
        """Scales along one row."""
        return 1 if self.group_size < 1 else -(-in_features // self.group_size)


class Quantized(NamedTuple):
    """Codes and what is needed to read them: ``w = (codes - zero_point) * scale``.

    ``codes``: int8 [N, K], signed and without offset, in [qmin, qmax] (also for asymmetric schemes, whose
    zero points are signed in the same range); for fp8 an ``float8_e4m3fn`` array [N, K]; for FP4 the E2M1 codes
    as uint8 [N, K], not yet packed.
    ``scale``: float32 [N, G] ([N/128, K/128] for blocks), its values exactly representable in the stored dtype;
    for nvfp4 the E4M3 local scales, for mxfp4 the E8M0 exponents, each as float32 values.
    ``zero_point``: int8 [N, G], or None for symmetric schemes.
    ``global_scale``: float32 [1] for nvfp4 as compressed-tensors stores it (a multiplier: w = code * local / global).
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None = None
    global_scale: np.ndarray | None = None

"""In which precision each tool computes, and what it does with a group of zeros: the facts behind every ``rule``.

Read in the sources of compressed-tensors 0.20, amd-quark 0.13, GPTQModel 6.0.3 and AutoRound 0.16.1, and checked
against what they wrote (tests/quant/test_golden_numbers.py). Both backends follow this one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16, F16, F32, DType

_EPSILON: Final = {BF16: 2.0**-7, F16: 2.0**-10, F32: 2.0**-23}


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The dtype of every intermediate of one scheme on weights of one dtype.

    ``math``: range and scale. ``stored``: the scale on disk; it is rounded to it before codes are chosen, unless
    ``rounds_late``. ``quotient``: weight over scale, and its sum with the zero point where ``adds_zero_first``.
    ``reciprocal``: multiply by F32 1 / scale instead of dividing. ``adds_zero_first``: the zero point is added before
    rounding to an integer, which moves ties and the last bit. ``zero_group``: what keeps a scale from being 0:
    "replace" a zero scale by ``floor``, lift every scale to at least ``floor``, or take the "range" [-1, 1].
    """

    math: DType
    stored: DType
    quotient: DType
    rounds_late: bool = False
    reciprocal: bool = False
    adds_zero_first: bool = False
    zero_group: Literal["replace", "floor", "range"] = "replace"
    floor: float = 0.0


def arithmetic_of(scheme: Scheme, weight: DType) -> Arithmetic:
    """What ``scheme.rule`` says for integers and FP8 of weights of this dtype."""
    if scheme.rule == "compressed-tensors":
        stored = scheme.scale_dtype or weight
        # The tool knows no other dtype than the weight's; where a format stores another, nothing is gained by
        # rounding to the weight's as well.
        math = weight if stored is weight else F32
        return Arithmetic(math, stored, math, adds_zero_first=True, zero_group="replace", floor=_EPSILON[stored])
    if scheme.rule == "quark":
        stored = scheme.scale_dtype or F32
        if scheme.type == "fp8":
            # As the exporter in memory has it; from file to file Quark takes the scale in F32 and still divides so.
            return Arithmetic(weight, stored, weight, zero_group="replace", floor=_EPSILON[F32])
        return Arithmetic(weight, stored, F32, reciprocal=True, zero_group="floor", floor=_EPSILON[F32])
    stored = scheme.scale_dtype or F16
    if scheme.rule == "gptq":
        return Arithmetic(F32, stored, F32, rounds_late=True, zero_group="range")
    floor = float(np.array(1e-5, stored.numpy))  # the tools clamp in the dtype of the scale
    if scheme.rule == "autoround":
        return Arithmetic(F32, stored, F32, zero_group="floor", floor=floor)
    # AWQ as AutoRound's in-memory path fills it: it does not widen the weight, and torch promotes the quotient.
    return Arithmetic(weight, stored, weight if weight is stored else F32, zero_group="floor", floor=floor)


def code_range(scheme: Scheme) -> tuple[int, int]:
    """The range in which the tool itself counts, in which zero points are added.

    ``Quantized`` holds signed codes always; GPTQ, AWQ, AutoRound and Quark's uint types count from 0.
    """
    if scheme.symmetric or scheme.rule == "compressed-tensors" or (scheme.rule == "quark" and scheme.num_bits == 8):
        return scheme.qmin, scheme.qmax
    return 0, (1 << scheme.num_bits) - 1


def half_range(scheme: Scheme) -> float:
    """What the largest magnitude is divided by to give a symmetric scale: 7.5 at 4 bits, and 8 where scales are signed."""
    if scheme.has_signed_scales:
        return float(1 << (scheme.num_bits - 1))
    return ((1 << scheme.num_bits) - 1) / 2


def global_scale_of(amax: float, math: DType) -> np.ndarray:
    """The NVFP4 multiplier 448 * 6 / amax as float32 [1], computed in ``math``, the dtype of the weight.

    As compressed-tensors' ``generate_gparam`` has it: torch divides a number by a tensor as the number times the
    tensor's reciprocal, each rounded; and where the result is not finite, as for a tensor of zeros, it is 1.
    """
    tiny = 2.0**-14 if math is F16 else 2.0**-126
    with np.errstate(over="ignore"):
        inverse = (np.float32(1.0) / np.array([max(amax, tiny)], np.float32)).astype(math.numpy).astype(np.float32)
        scale = (np.float32(2688.0) * inverse).astype(math.numpy).astype(np.float32)
    return np.where(np.isfinite(scale), scale, np.float32(1.0))

"""Inputs of linears as engines quantize them while they run, and what they stand for afterwards.

A linear whose inputs are quantized multiplies other numbers than a float one: codes times scales. Here are those
numbers, as the engines' kernels choose them: round to nearest, ties to even, scales from the largest magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from tensorsurgeon.quant.rtn.fp4 import constant, e2m1_codes, mx_scale, values_of

_E4M3_MAX: Final = 448.0
_E2M1_MAX: Final = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScheme:
    """How the inputs [tokens, features] of a linear are quantized.

    ``per``: one scale for each token, for the whole tensor, or for each ``group_size`` features of a token. ``symmetric``
    integers only need no zero point. ``is_static``: the scale is in the file (NVFP4's is the multiplier over all groups).
    """

    type: Literal["int", "fp8", "nvfp4", "mxfp4"]
    num_bits: int = 8
    per: Literal["token", "tensor", "group"] = "token"
    group_size: int = 0
    symmetric: bool = True
    is_static: bool = False

    def __str__(self) -> str:
        kind = f"int{self.num_bits}" if self.type == "int" else self.type
        shape = f"group of {self.group_size}" if self.per == "group" else self.per
        return f"{kind} per {shape}, {'static' if self.is_static else 'dynamic'}"


def quantized_inputs(inputs: Tensor, scheme: InputScheme, scale: float | None = None) -> Tensor:
    """F32 values that the codes of ``inputs`` [..., features] stand for, in the same shape.

    ``scale`` is the static one: what codes are multiplied by, for NVFP4 what local scales were multiplied by.
    """
    features = inputs.shape[-1]
    values = inputs.float().reshape(-1, features)
    if scheme.per == "group":
        # The last group may be short: zeros change no magnitude.
        short = -features % scheme.group_size
        values = torch.nn.functional.pad(values, (0, short)).reshape(len(values), -1, scheme.group_size)
    made = _quantized(values, scheme, scale)
    return made.reshape(len(made), -1)[:, :features].reshape(inputs.shape)


def _quantized(values: Tensor, scheme: InputScheme, static: float | None) -> Tensor:
    """The same for F32 values [n, ..., k]: one scale for each run of the last axis, or one for all."""
    if scheme.type == "int" and not scheme.symmetric:
        return _with_zero_points(values, scheme)
    amax = values.abs().amax() if scheme.per == "tensor" else values.abs().amax(-1, keepdim=True)
    match scheme.type:
        case "int":
            largest = float((1 << (scheme.num_bits - 1)) - 1)
            scale = constant(static, amax) if static is not None else amax / constant(largest, amax)
            return torch.round(values / _no_zero(scale)).clamp(-largest - 1, largest) * scale
        case "fp8":
            scale = constant(static, amax) if static is not None else amax / constant(_E4M3_MAX, amax)
            return _e4m3(values / _no_zero(scale)) * scale
        case "nvfp4":
            over_all = constant(static, amax) if static is not None else _E4M3_MAX * _E2M1_MAX / _no_zero(values.abs().amax())
            scale = _e4m3(over_all * (amax / constant(_E2M1_MAX, amax))) / over_all
        case "mxfp4":
            # By the rule for weights, which vLLM's reference of the format and compressed-tensors have for inputs too.
            scale = mx_scale(amax)
    return values_of(e2m1_codes(values / _no_zero(scale))) * scale


def _with_zero_points(values: Tensor, scheme: InputScheme) -> Tensor:
    least, most = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    levels = float((1 << scheme.num_bits) - 1)
    scale = _no_zero((most - least) / constant(levels, most))
    zero = torch.round(-least / scale)
    return ((torch.round(values / scale) + zero).clamp(0, levels) - zero) * scale


def _e4m3(values: Tensor) -> Tensor:
    # Clamped first: the cast of torch has no saturation of its own on every device.
    return values.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()


def _no_zero(scale: Tensor) -> Tensor:
    """For dividing by: what has no magnitude is all zeros, whatever it is divided by."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)

"""E2M1 by the rules of compressed-tensors, in torch: NVFP4 and MXFP4.

E2M1 holds 0, 0.5, 1, 1.5, 2, 3, 4, 6 as codes 0 to 7 and their negatives as 8 to 15. Ties go to the even code, and
a negative number that rounds to zero keeps its sign (code 8), but -0.0 itself becomes 0.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.ao.quantization.observer import MinMaxObserver

from tensorsurgeon.quant.rtn.arithmetic import global_scale_of
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import DType

VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nvfp4(weight: Tensor, dtype: DType, scheme: Scheme, global_amax: float | None) -> Quantized:
    """Groups of 16 with E4M3 scales under one F32 multiplier: w = code * scale / global_scale.

    The multiplier spreads the scales over the range of E4M3 (448), so that the largest group reaches it.
    """
    groups = weight.view(len(weight), -1, scheme.group_size)
    multiplier = global_scale_of(amax_of(weight) if global_amax is None else global_amax, dtype)
    wide = torch.from_numpy(multiplier).to(weight.device)
    amax = groups.abs().amax(dim=-1)
    local = wide * (amax / constant(6.0, amax)).float()
    # Clamped first: the cast of torch has no saturation of its own on every device.
    local = torch.clamp(local, -448.0, 448.0).to(torch.float8_e4m3fn).float()
    local = torch.where(local == 0, 0.125, local)
    codes = e2m1_codes(groups.float() / (local / wide)[:, :, None])
    return Quantized(codes.flatten(1).cpu().numpy(), local.cpu().numpy(), None, multiplier)


def mxfp4(weight: Tensor, scheme: Scheme) -> Quantized:
    """Groups of 32 with a power of two as scale, so that no weight exceeds 8 of it and few exceed 6.

    The amax is rounded to a power of two at 1.75, half-way between the E2M1 neighbours 6 and 8 in its binade.
    F16 weights are widened first: in F16, the tool gives groups of subnormals the scale 1.
    """
    groups = weight.float().view(len(weight), -1, scheme.group_size)
    scale = mx_scale(groups.abs().amax(dim=-1))
    return Quantized(e2m1_codes(groups / scale[:, :, None]).flatten(1).cpu().numpy(), scale.cpu().numpy())


def mx_scale(amax: Tensor) -> Tensor:
    """The power of two for groups whose largest magnitudes are ``amax`` (F32), as ``mxfp4`` says."""
    exponent = ((amax.contiguous().view(torch.int32) + (1 << 21)) >> 23) - 2  # biased by 127
    exponent = exponent.clamp(min=0)
    # 2**-127, the least E8M0, is a subnormal: its bits are the top of the mantissa.
    return torch.where(exponent == 0, 1 << 22, exponent << 23).to(torch.int32).view(torch.float32)


def constant(value: float, like: Tensor) -> Tensor:
    """A number as a tensor beside ``like``: dividing a GPU tensor by a plain number multiplies by its reciprocal."""
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def amax_of(weight: Tensor) -> float:
    """The largest magnitude of a weight, by torch's per-tensor observer."""
    observer = MinMaxObserver().to(weight.device)
    observer(weight.float())
    return float(torch.maximum(-observer.min_val, observer.max_val))


def values_of(codes: Tensor) -> Tensor:
    """uint8 E2M1 codes as F32."""
    table = torch.tensor([*VALUES, *(-v for v in VALUES)], device=codes.device)
    return table[codes.long()]


def e2m1_codes(scaled: Tensor) -> Tensor:
    """uint8 E2M1 codes of numbers that were divided by their scales."""
    size = scaled.abs()
    code = (size > 0.25).to(torch.uint8)
    for bound, closed in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        code += size >= bound if closed else size > bound
    return code | (scaled < 0).to(torch.uint8) << 3

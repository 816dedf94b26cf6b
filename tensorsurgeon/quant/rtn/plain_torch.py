"""The torch backend: round to nearest by each tool's rule, written as the tools write it.

This is the reference that the compiled loops are held to, and it runs on a GPU. ``torch.ao`` observers choose the
scales wherever the tool's rule is theirs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from tensorsurgeon.quant.rtn import fp4
from tensorsurgeon.quant.rtn.arithmetic import Arithmetic, arithmetic_of, code_range, half_range
from tensorsurgeon.quant.rtn.backend import check_groups, is_supported, refuse_nonfinite_scale, refuse_nonfinite_weight
from tensorsurgeon.quant.rtn.fp4 import constant
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F16, F32, DType, dtype_of

TORCH_DTYPES = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32}


class TorchBackend:
    """Every scheme, on the CPU or a GPU; ``device`` is where the arithmetic runs."""

    name = "torch"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def serves(self, scheme: Scheme, dtype: DType) -> bool:
        """Whether weights of this dtype can be quantized by this scheme."""
        return is_supported(scheme, dtype)

    @torch.no_grad()
    def quantize(self, weight: np.ndarray, scheme: Scheme, *, global_amax: float | None = None) -> Quantized:
        """Codes and scales of a weight [N, K]; see ``Backend``."""
        check_groups(weight.shape, scheme)
        tensor = tensor_of(weight).to(self.device)
        if not bool(torch.isfinite(tensor).all()):
            refuse_nonfinite_weight(weight)
        if scheme.type == "nvfp4":
            return fp4.nvfp4(tensor, dtype_of(weight), scheme, global_amax)
        if scheme.type == "mxfp4":
            return fp4.mxfp4(tensor, scheme)
        arithmetic = arithmetic_of(scheme, dtype_of(weight))
        if scheme.type == "fp8":
            return _fp8(tensor, scheme, arithmetic)
        made = integer_codes(tensor, scheme, arithmetic)
        zero_point = None if made.zero_point is None else made.zero_point.cpu().numpy()
        return Quantized(made.codes.cpu().numpy(), made.scale.cpu().numpy(), zero_point)

    @torch.no_grad()
    def dequantize(self, quantized: Quantized, scheme: Scheme, dtype: DType) -> np.ndarray:
        """Weights [N, K] in ``dtype``; see ``Backend``."""
        if scheme.type == "fp8":
            values = tensor_of(quantized.codes.view(np.uint8)).view(torch.float8_e4m3fn).to(self.device).float()
        elif scheme.type == "int":
            values = tensor_of(quantized.codes).to(self.device).float()
        else:
            values = fp4.values_of(tensor_of(quantized.codes).to(self.device))
        scale = tensor_of(quantized.scale).to(self.device)
        if quantized.global_scale is not None:
            scale = scale / tensor_of(quantized.global_scale).to(self.device)
        rows, columns = values.shape
        if scheme.block is not None:
            height, width = scheme.block
            full = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
            return array_of((values * full).to(TORCH_DTYPES[dtype]), dtype)
        if scheme.group_size > 0 and columns % scheme.group_size:
            # The last group is short.
            if quantized.zero_point is not None:
                zero = tensor_of(quantized.zero_point).to(self.device).float()
                values = values - zero.repeat_interleave(scheme.group_size, 1)[:, :columns]
            full = scale.repeat_interleave(scheme.group_size, 1)[:, :columns]
            return array_of((values * full).to(TORCH_DTYPES[dtype]), dtype)
        groups = values.view(rows, scheme.groups(columns), -1)
        if quantized.zero_point is not None:
            groups = groups - tensor_of(quantized.zero_point).to(self.device).float()[:, :, None]
        return array_of((groups * scale[:, :, None]).view(rows, columns).to(TORCH_DTYPES[dtype]), dtype)


def tensor_of(array: np.ndarray) -> Tensor:
    """A tensor of an array's elements, without a copy where the array is writable; BF16 by way of its bits."""
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    if array.dtype == BF16.numpy:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_of(tensor: Tensor, dtype: DType) -> np.ndarray:
    """The array of a tensor whose elements are ``dtype``."""
    tensor = tensor.cpu().contiguous()
    if dtype is BF16:
        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


class IntegerCodes(NamedTuple):
    """On the device of the weight: codes int8 [N, K], scale F32 [N, G] as stored, zero point int8 [N, G] or None."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


def integer_codes(weight: Tensor, scheme: Scheme, arithmetic: Arithmetic) -> IntegerCodes:
    """A finite weight [N, K] rounded to nearest by the scheme's rule, wherever it lies."""
    rows, columns = weight.shape
    groups = weight.view(rows, scheme.groups(columns), -1)
    scale, zero_point = _scale(groups, scheme, arithmetic)
    if scheme.has_signed_scales:
        scale = _signed(scale, groups, scheme, arithmetic)
    stored = scale.to(TORCH_DTYPES[arithmetic.stored]).float()
    if not bool(torch.isfinite(stored).all()):
        refuse_nonfinite_scale(stored.cpu().numpy(), arithmetic)
    quotient = TORCH_DTYPES[arithmetic.quotient]
    values, divisor = (
        groups.to(quotient),
        (scale if arithmetic.rounds_late else stored).to(quotient)[:, :, None],
    )
    low, high = code_range(scheme)
    scaled = values * (1.0 / divisor) if arithmetic.reciprocal else values / divisor
    if zero_point is None:
        codes = torch.round(torch.clamp(scaled, low, high))
    elif arithmetic.adds_zero_first:
        codes = torch.round(torch.clamp(scaled + zero_point[:, :, None].to(quotient), low, high))
    else:
        codes = torch.clamp(torch.round(scaled) + zero_point[:, :, None].to(quotient), low, high)
    shift = low - scheme.qmin
    return IntegerCodes(
        (codes - shift).to(torch.int8).view(rows, columns),
        stored,
        None if zero_point is None else (zero_point - shift).to(torch.int8),
    )


def _scale(groups: Tensor, scheme: Scheme, arithmetic: Arithmetic) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point [N, G] of weights [N, G, g]; the zero point in the range in which the tool counts."""
    low, high = code_range(scheme)
    math = TORCH_DTYPES[arithmetic.math]
    # The observers compute in F32; Quark's rule is theirs, epsilon included.
    if scheme.rule == "quark" and math is torch.float32 and not scheme.has_signed_scales:
        return _observed(groups, scheme, low, high)
    minimum, maximum = torch.aminmax(groups.to(math), dim=-1)
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    amax = torch.maximum(-minimum, maximum)
    span, steps = (amax, half_range(scheme)) if scheme.symmetric else (maximum - minimum, high - low)
    scale = span / constant(steps, span)
    if arithmetic.zero_group == "range":
        # Also where the division underflows, which the tool does not survive.
        minimum = torch.where(scale == 0, -1.0, minimum)
        scale = torch.where(scale == 0, (1.0 if scheme.symmetric else 2.0) / constant(steps, span), scale)
    unrounded = scale
    if not arithmetic.rounds_late:
        # Signed ones by no observer: what is stored is divided by as it is.
        scale = scale.to(TORCH_DTYPES[arithmetic.stored]).to(torch.float32 if scheme.has_signed_scales else math)
    if arithmetic.zero_group == "floor":
        scale = scale.clamp(min=arithmetic.floor)
    elif arithmetic.zero_group == "replace":
        scale = torch.where(scale == 0, constant(arithmetic.floor, scale), scale)
    if scheme.symmetric:
        return scale, None
    if scheme.rule == "compressed-tensors":
        # Before a zero scale is replaced: 0 / 0 is NaN, which the tool's cast to int8 makes 0.
        return scale, torch.round(torch.clamp(low - minimum / unrounded, low, high)).float().nan_to_num(0.0)
    if scheme.rule == "quark":
        return scale, torch.clamp(low - torch.round(minimum / scale), low, high).float()
    quotient = TORCH_DTYPES[arithmetic.quotient]
    return scale, torch.round(-minimum.to(quotient) / scale.to(quotient)).float()


def _signed(scale: Tensor, groups: Tensor, scheme: Scheme, arithmetic: Arithmetic) -> Tensor:
    """``scale`` [N, G] with the sign that makes the extreme weight of its group ``qmin``: negative unless the minimum leads.

    A scale that the stored dtype rounds to 0 has lost its sign, and what takes its place is positive.
    """
    minimum, maximum = torch.aminmax(groups.float(), dim=-1)
    low, high = -minimum.clamp(max=0), maximum.clamp(min=0)
    extreme = torch.maximum(low, high).to(TORCH_DTYPES[arithmetic.math])
    size = extreme / constant(half_range(scheme), extreme)
    # Where a group of zeros takes the range [-1, 1] nothing is lost.
    lost = (scale if arithmetic.zero_group == "range" else size).to(TORCH_DTYPES[arithmetic.stored]) == 0
    return torch.where((high < low) | lost, scale, -scale)


def _observed(groups: Tensor, scheme: Scheme, low: int, high: int) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point by ``torch.ao``: its per-channel observer with one channel per group."""
    affine: Any = torch.per_channel_symmetric if scheme.symmetric else torch.per_channel_affine
    dtype = torch.quint8 if low == 0 else torch.qint8
    observer = PerChannelMinMaxObserver(ch_axis=0, dtype=dtype, qscheme=affine, quant_min=low, quant_max=high)
    observer.to(groups.device)(groups.reshape(-1, groups.shape[-1]))
    # On the CPU, because a GPU multiplies by the reciprocal where the observer divides by a number.
    scale, zero_point = observer.cpu().calculate_qparams()
    scale = scale.to(groups.device).view(groups.shape[:2])
    return scale, None if scheme.symmetric else zero_point.to(groups.device).view(groups.shape[:2]).float()


def _fp8(weight: Tensor, scheme: Scheme, arithmetic: Arithmetic) -> Quantized:
    """E4M3 with scales amax / 448, per row, group or block; blocks at the edges are filled with zeros."""
    rows, columns = weight.shape
    height, width = scheme.block or (1, columns if scheme.group_size == -1 else scheme.group_size)
    math = TORCH_DTYPES[arithmetic.math]
    padded = torch.nn.functional.pad(weight.to(math), (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    amax = blocks.abs().amax(dim=(1, 3))
    scale = (amax / constant(448.0, amax)).to(TORCH_DTYPES[arithmetic.stored])
    scale = torch.where(scale == 0, constant(arithmetic.floor, scale), scale)
    if not bool(torch.isfinite(scale).all()):
        refuse_nonfinite_scale(scale.float().cpu().numpy(), arithmetic)
    codes = torch.clamp(blocks / scale.to(math)[:, None, :, None], -448.0, 448.0).to(torch.float8_e4m3fn)
    kept = codes.view(torch.uint8).reshape(padded.shape)[:rows, :columns].contiguous()
    e4m3 = kept.cpu().numpy().view(ml_dtypes.float8_e4m3fn)
    return Quantized(e4m3, scale.float().cpu().numpy())

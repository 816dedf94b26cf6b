"""A batch of weights on the card while it is quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from tensorsurgeon.quant.gptq.card.gptq import dequantize, energy


class Made:
    """A batch while it is quantized: [B, R, K] weights and codes, [B, R, G] scales, F64 [B, R] losses (NaN: not measured)."""

    def __init__(self, *, weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        self.weight = weight
        self.codes = codes
        self.scale = scale
        self.zero_point = zero_point
        self.loss = torch.full(weight.shape[:2], float("nan"), dtype=torch.float64, device=weight.device)
        self.energy = self.loss.clone()

    def measure(self, hessian: Tensor, which: list[int]) -> None:
        """Loss and energy of the codes as they are."""
        if not which:
            return
        zero_point = None if self.zero_point is None else self.zero_point[which]
        weight = self.weight[which]
        self.loss[which] = energy(weight - dequantize(self.codes[which], self.scale[which], zero_point), hessian[which])
        self.energy[which] = energy(weight, hessian[which])

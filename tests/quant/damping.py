"""A damped Hessian written out, as a yardstick."""

from __future__ import annotations

import torch
from torch import Tensor


def damp(hessian: Tensor, damp_percent: float) -> Tensor:
    """H + damp_percent * mean(diag H) * I over live columns; dead columns get the mean itself."""
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = float(diagonal[live].double().mean()) if bool(live.any()) else 0.0
    damped = hessian.clone()
    damped.diagonal().copy_(torch.where(live, diagonal + damp_percent * mean, torch.full_like(diagonal, mean)))
    return damped

"""The flipped Cholesky factors of many Hessians at once (``hessian.flipped_cholesky`` is one on the CPU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorsurgeon.errors import NumericError
from tensorsurgeon.quant.gptq.hessian import FIRST_DAMPING, LAST_DAMPING, PIVOT_FLOOR, PROBE_TOLERANCE, ActOrder


@dataclass(frozen=True, slots=True)
class Factors:
    """``lower`` F32 [B, K, K] and ``order`` [B, K] as in ``FlippedFactor``; ``added`` [B, K] is what damping added.

    ``damp_percent``: F64 [B].
    """

    lower: Tensor
    order: Tensor
    added: Tensor
    damp_percent: Tensor

    def column_cost(self) -> Tensor:
        """What one squared unit of rounding error costs in each column, [B, K]."""
        cost = torch.empty_like(self.added)
        return cost.scatter_(1, self.order, self.lower.diagonal(dim1=1, dim2=2).square())


def factor(hessian: Tensor, damp_percent: Tensor, act_order: ActOrder) -> Factors:
    """Factor damped Hessians [B, K, K] whose inputs were not all zero; ``damp_percent`` F64 [B] is raised where it has to be.

    Raises NumericError where no damping helps.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    live = diagonal > 0
    mean = torch.where(live, diagonal, 0.0).double().sum(1) / live.sum(1)
    if act_order == "none":
        order = torch.arange(hessian.shape[1], device=hessian.device).flip(0).expand(len(hessian), -1).contiguous()
    else:
        order = torch.argsort(diagonal, dim=1, descending=True, stable=True).flip(1)
    used = damp_percent.clone()
    lower, damped, sound = _attempt(hessian, diagonal, live, mean, order, used)
    while not bool(sound.all()):
        failed = torch.nonzero(~sound)[:, 0]
        if bool((used[failed] > LAST_DAMPING).any()):
            raise NumericError(
                f"Hessian of {hessian.shape[1]} columns has no Cholesky factor even at damp_percent={float(used.max()):g}"
            )
        used[failed] = (used[failed] * 10).clamp(min=FIRST_DAMPING)
        again = _attempt(hessian[failed], diagonal[failed], live[failed], mean[failed], order[failed], used[failed])
        lower[failed], damped[failed], sound[failed] = again
    return Factors(lower, order, damped - diagonal, used)


def correction(cross: Tensor, hessian: Tensor, ridge: Sequence[float]) -> Tensor:
    """``asymmetric.correction`` of many: C (H + ridge)^-1, [B, K, K]."""
    if not bool(torch.isfinite(cross).all()):
        raise NumericError("cross products of original and quantized inputs are not finite")
    factors = factor(hessian, torch.tensor(ridge, dtype=torch.float64, device=hessian.device), "none")
    order = factors.order[:, :, None].expand_as(cross)
    solved = torch.cholesky_solve(torch.gather(cross.mT, 1, order), factors.lower)
    return torch.empty_like(cross).scatter_(1, order, solved).mT.contiguous()


def _attempt(
    hessian: Tensor, diagonal: Tensor, live: Tensor, mean: Tensor, order: Tensor, damp_percent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors, damped diagonals, and which factors are sound: no pivot lost in rounding, a probe multiplied right."""
    damped = torch.where(live, diagonal + (damp_percent * mean)[:, None].float(), mean[:, None].float())
    batch, columns = order.shape
    if batch == 1:
        permuted = hessian[:, order[0]][:, :, order[0]]
    else:
        rows = torch.gather(hessian, 1, order[:, :, None].expand(-1, -1, columns))
        permuted = torch.gather(rows, 2, order[:, None, :].expand(-1, columns, -1))
        del rows
    wanted_diagonal = torch.gather(damped, 1, order)
    permuted.diagonal(dim1=1, dim2=2).copy_(wanted_diagonal)
    probe = torch.cos(torch.arange(columns, dtype=torch.float32, device=hessian.device)).expand(batch, -1)
    wanted = torch.bmm(permuted, probe[:, :, None])[..., 0]
    lower, info = torch.linalg.cholesky_ex(permuted)
    lower = lower.contiguous()
    del permuted
    found = torch.bmm(lower, torch.bmm(lower.mT, probe[:, :, None]))[..., 0]
    pivots = lower.diagonal(dim1=1, dim2=2).square()
    sound = (info == 0) & (pivots > PIVOT_FLOOR * wanted_diagonal).all(1)
    sound &= torch.linalg.vector_norm(found - wanted, dim=1) <= PROBE_TOLERANCE * torch.linalg.vector_norm(wanted, dim=1)
    return lower, damped, sound

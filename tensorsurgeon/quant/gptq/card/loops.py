"""The loops of ``kernels`` in plain torch, for a machine without Triton and as a yardstick: slow, a column at a time.

Matrices are [B, R, K]: B Hessians, R rows that share each. ``zero`` is None for a symmetric grid.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_candidate(weight: Tensor, candidates: Tensor, zero: Tensor | None, importance: Tensor, qmin: int, qmax: int) -> Tensor:
    """Of ``candidates`` [C, B, R, G] the scale of each group with the least error weighted by ``importance`` [B, K]."""
    _, batch, rows, groups = candidates.shape
    weight = weight.view(batch, rows, groups, -1)
    cost = importance.view(batch, 1, groups, -1)
    offset = torch.zeros((), device=weight.device) if zero is None else zero[..., None]
    best = torch.full_like(candidates[0], float("inf"))
    chosen = candidates[0].clone()
    for scale in candidates:
        inverse = 1.0 / torch.where(scale == 0, torch.ones_like(scale), scale)
        level = (weight * inverse[..., None] + offset).round().clamp(qmin, qmax)
        off = weight - (level - offset) * scale[..., None]
        error = (cost * (off * off)).sum(3)
        take = error < best
        best = torch.where(take, error, best)
        chosen = torch.where(take, scale, chosen)
    return chosen


def column_loop(
    weight: Tensor, owed: Tensor, lower: Tensor, added: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor,
    codes: Tensor, residual: Tensor, loss: Tensor, start: int, qmin: int, qmax: int,
) -> None:  # fmt: skip
    """Quantize columns ``start`` and on, as many as ``owed`` [B, R, W] has, from their end; fills codes, residual and loss.

    ``weight`` [B, R, K], ``lower`` [B, K, K] and ``added`` [B, K] are in visiting order; ``group`` [B, K] int32 says in which
    group each column lies; ``owed`` is what columns outside the block left behind.
    """
    sums = owed.clone()
    for j in range(owed.shape[2] - 1, -1, -1):
        column = start + j
        line = lower[:, column, start : start + owed.shape[2]]
        pivot = line[:, j, None]
        where = group[:, column].long()[:, None, None].expand(-1, scale.shape[1], 1)
        size = torch.gather(scale, 2, where)[..., 0]
        offset = 0.0 if zero is None else torch.gather(zero, 2, where)[..., 0]
        divisor = torch.where(size == 0, torch.ones_like(size), size)
        wanted = weight[:, :, column] + sums[:, :, j] / pivot
        level = (wanted / divisor + offset).round().clamp(qmin, qmax)
        rest = weight[:, :, column] - (level - offset) * size
        off = sums[:, :, j] + rest * pivot
        loss += off * off - added[:, column, None] * rest * rest
        codes[:, :, column] = level.to(torch.int8)
        residual[:, :, column] = rest
        sums += rest[:, :, None] * line[:, None, :]


def descend(
    gradient: Tensor, damped: Tensor, order: Tensor, codes: Tensor, change: Tensor, scale: Tensor, zero: Tensor | None,
    gain: Tensor, starts: Tensor, group_size: int, qmin: int, qmax: int, sweeps: int,
) -> None:  # fmt: skip
    """Move each code of a block to its best value given all others; changes codes, change and gain.

    ``gradient`` [B, R, W] and ``damped`` [B, W, W] are the block's; it begins at column ``starts`` [B] of each matrix, and its
    columns are visited in ``order`` [B, W].
    """
    slope = gradient.clone()
    first = starts.long()[:, None]
    for i in list(range(order.shape[1])) * sweeps:
        local = order[:, i, None].long()
        column = _per_row(first + local, codes)
        group = _per_row((first + local) // group_size, codes)
        inside = _per_row(local, codes)
        line = torch.gather(damped, 1, local[:, :, None].expand(-1, -1, damped.shape[2]))
        curve = torch.gather(line[:, 0], 1, local)
        size = torch.gather(scale, 2, group)[..., 0]
        offset = 0.0 if zero is None else torch.gather(zero, 2, group)[..., 0]
        divisor = torch.where(size == 0, torch.ones_like(size), size)
        code = torch.gather(codes, 2, column)[..., 0].float()
        pull = torch.gather(slope, 2, inside)[..., 0]
        new = (((code - offset) * size + pull / curve) / divisor + offset).round().clamp(qmin, qmax)
        move = (new - code) * size
        fall = move * (2.0 * pull - move * curve)
        taken = fall > 0
        move = torch.where(taken, move, torch.zeros_like(move))
        gain += torch.where(taken, fall, torch.zeros_like(fall))
        codes.scatter_(2, column, torch.where(taken, new, code).to(torch.int8)[..., None])
        change.scatter_add_(2, column, -move[..., None])
        slope -= move[..., None] * line


def _per_row(index: Tensor, matrix: Tensor) -> Tensor:
    """[B, 1] as an index into the last axis of [B, R, K], for every row."""
    return index[:, :, None].expand(-1, matrix.shape[1], 1)

"""GPTQ of many weights on a card: the algorithm of ``quant.gptq.gptq``, batched over Hessians and the rows that share one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from tensorsurgeon.errors import NumericError
from tensorsurgeon.quant.gptq.card.factor import Factors, factor
from tensorsurgeon.quant.gptq.card.polish import polish
from tensorsurgeon.quant.gptq.gptq import GptqOptions
from tensorsurgeon.quant.gptq.scale_search import ScaleSearch, StoreScale

# Columns per block of the column loop; the kernels hold a tile of so many. Part of the result's bits.
BLOCK: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which codes exist, and how scales are stored. ``group_size`` -1 is one group per row."""

    qmin: int
    qmax: int
    group_size: int
    store_scale: StoreScale


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Results for [B, R, K]: codes int8, scale F32 [B, R, G], loss and energy F32 [B, R], damping F64 [B]."""

    codes: Tensor
    scale: Tensor
    loss: Tensor
    energy: Tensor
    damp_percent: Tensor


def loops_for(device: torch.device) -> Any:
    """The module with the loops: Triton's kernels on a card (or interpreted, for tests), else plain torch."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from tensorsurgeon.quant.gptq.card import kernels

        return kernels
    from tensorsurgeon.quant.gptq.card import loops

    return loops


def gptq_batch(
    weight: Tensor,
    hessian: Tensor,
    *,
    scale: Tensor,
    zero_point: Tensor | None,
    damp_percent: Tensor,
    grid: Grid,
    options: GptqOptions,
) -> Batch:
    """Quantize ``weight`` F32 [B, R, K] under ``hessian`` F32 [B, K, K], finite and none of them all zero.

    ``scale`` and ``zero_point`` F32 [B, R, G] are the base grid; ``damp_percent`` F64 [B]. The block size is ``BLOCK``
    whatever the options say.
    """
    factors = factor(hessian, damp_percent, options.act_order)
    if options.search is not None:
        scale = search(weight, scale, zero_point, factors.column_cost(), grid, options.search)
    else:
        scale = _stored(scale, grid.store_scale)
    codes, loss = _columns(weight, factors, scale, zero_point, grid)
    added = factors.added
    damping = factors.damp_percent
    # The factors are as large as the Hessians, and polishing needs neither.
    del factors
    if options.polish is not None:
        polished = polish(
            weight, hessian, codes, scale, zero_point, damping=added, qmin=grid.qmin, qmax=grid.qmax,
            group_size=grid.group_size, store_scale=grid.store_scale, options=options.polish, loops=loops_for(weight.device),
        )  # fmt: skip
        codes, scale, loss = polished.codes, polished.scale, loss - polished.row_gain
    return Batch(codes=codes, scale=scale, loss=loss.clamp_(min=0.0), energy=energy(weight, hessian), damp_percent=damping)


def search(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, importance: Tensor, grid: Grid, options: ScaleSearch
) -> Tensor:
    """The stored scale of each group with the least weighted error; see ``scale_search.search_scale``."""
    safe = _stored(scale, grid.store_scale)
    ratios = torch.tensor(options.ratios(), dtype=torch.float32, device=scale.device)
    candidates = grid.store_scale(scale * ratios[:, None, None, None]).float()
    candidates = torch.where(torch.isfinite(candidates), candidates, safe).contiguous()
    made: Tensor = loops_for(weight.device).best_candidate(
        weight, candidates, zero_point, importance.contiguous(), grid.qmin, grid.qmax
    )
    return made


def round_to_nearest(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """clamp(round(w / scale + zero_point)), int8 [B, R, K]."""
    batch, rows, groups = scale.shape
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)[..., None]
    level = weight.view(batch, rows, groups, -1) / divisor
    if zero_point is not None:
        level = level + zero_point[..., None]
    return level.round_().clamp_(grid.qmin, grid.qmax).to(torch.int8).view(weight.shape)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """(codes - zero_point) * scale, F32 [B, R, K]."""
    level = codes.view(*scale.shape, -1).float()
    if zero_point is not None:
        level = level - zero_point[..., None]
    return (level * scale[..., None]).view(codes.shape)


def energy(weight: Tensor, hessian: Tensor) -> Tensor:
    """The diagonal of W H W^T, F64 [B, R]."""
    return torch.bmm(weight, hessian).mul_(weight).sum(2, dtype=torch.float64)


def _stored(scale: Tensor, store_scale: StoreScale) -> Tensor:
    rounded = store_scale(scale).float().contiguous()
    if not bool(torch.isfinite(rounded).all()):
        raise NumericError(f"scale {float(scale.abs().max()):g} does not fit the stored type")
    return rounded


def _columns(weight: Tensor, factors: Factors, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes [B, R, K] and the loss on the undamped Hessian [B, R]."""
    batch, rows, columns = weight.shape
    order, lower = factors.order, factors.lower
    loops = loops_for(weight.device)
    permuted = _reordered(weight, order)
    residual = torch.empty_like(permuted)
    codes = torch.empty(batch, rows, columns, dtype=torch.int8, device=weight.device)
    loss = torch.zeros(batch, rows, device=weight.device)
    group = (order // (columns if grid.group_size == -1 else grid.group_size)).int()
    added = torch.gather(factors.added, 1, order)
    # The factor is flipped, so the column to visit first is the last.
    for stop in range(columns, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        if stop < columns:
            owed = torch.bmm(residual[:, :, stop:], lower[:, stop:, start:stop])
        else:
            owed = torch.zeros(batch, rows, stop - start, device=weight.device)
        loops.column_loop(
            permuted, owed, lower, added, scale, zero_point, group, codes, residual, loss, start, grid.qmin, grid.qmax
        )
    del permuted, residual
    return _reordered(codes, torch.argsort(order, dim=1)), loss


def _reordered(matrix: Tensor, order: Tensor) -> Tensor:
    """Columns of each matrix in its own order; a new tensor."""
    if len(order) == 1:
        return matrix[:, :, order[0]].contiguous()
    return torch.gather(matrix, 2, order[:, None, :].expand(-1, matrix.shape[1], -1))

"""Improve codes and scales after GPTQ, in the same format: coordinate descent on the layer's output error.

GPTQ fixes each column once and never returns. Here blocks of columns are visited again with everything else as it now is:
each group's scale moves to its best value given the codes, then each code to its best given the others (as in QuantEase,
arXiv 2309.01885, and CDQuant, arXiv 2406.17542). With ``D = W - Q`` and ``G = H D``, code ``j`` is best at
``round((Q_j + G_j / H_jj) / s)``, and a group's scale at ``s + c.G / c.Hc``, ``c`` being its codes. ``G`` is computed afresh
for each block, so no rounding error builds up, and a refit scale is the price of one small product.
Every single step lowers the loss on the damped Hessian, or is not taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.quant.gptq.levels import EVEN, Spacing
from tensorsurgeon.quant.gptq.scale_search import StoreScale, zero_rows
from tensorsurgeon.quant.loops import polish as loops
from tensorsurgeon.quant.loops.tiles import PANEL_COLUMNS, TILE_ROWS
from tensorsurgeon.tensors.arrays import aligned

# Columns per block of descent, sized for the kernel's tiles.
BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Polish:
    """``rounds`` visits of every block; ``sweeps`` passes over the columns of a block per visit.

    A second sweep costs a tenth of a visit and is worth half of one; a third round takes off another 3 %.
    """

    rounds: int = 2
    sweeps: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Polished:
    """``row_gain``: F64 [N], by how much the diagonal of D H D^T (H undamped) fell; it may rise where damping pays."""

    codes: Tensor
    scale: Tensor
    row_gain: Tensor


def polish(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    damping: Tensor,
    qmin: int,
    qmax: int,
    group_size: int,
    store_scale: StoreScale,
    options: Polish | None = None,
    spacing: Spacing = EVEN,
    keep_scales: bool = False,
) -> Polished:
    """Codes and scales with no more output error than those given, usually a quarter less.

    ``weight`` [N, K] F32, ``hessian`` [K, K] undamped, ``damping`` [K] what is added to its diagonal (all entries
    positive in sum), ``codes`` [N, K] in the grid's ``code_dtype``, ``scale`` [N, G] as stored, which ``keep_scales`` leaves as
    they are. Nothing given is changed.
    """
    options = options or Polish()
    columns = weight.shape[1]
    group_size = columns if group_size == -1 else group_size
    state = _State(
        hessian=hessian.contiguous(),
        damping=damping,
        change=torch.empty(0),
        # Clones: the transpose of a single row or column is contiguous as it is, and both are written to.
        codes=codes.T.clone(memory_format=torch.contiguous_format),
        scale=scale.T.clone(memory_format=torch.contiguous_format),
        zero_point=zero_rows(zero_point, (scale.shape[1], scale.shape[0])),
        group_size=group_size,
        gain=torch.zeros(weight.shape[0], dtype=torch.float64),
    )
    state.change = weight.T - (state.codes - _per_column(state.zero_point, group_size)) * _per_column(state.scale, group_size)
    damping_before = _row_energy(state.change, damping)
    importance = hessian.diagonal() + damping
    blocks = _by_importance(_blocks(columns, group_size), importance)
    large_groups = group_size > BLOCK
    refits = not keep_scales
    groups = _by_importance([(s, s + group_size) for s in range(0, columns, group_size)], importance)
    for _ in range(options.rounds):
        for start, stop in groups if large_groups and refits else []:
            _refit_scales(state, start, stop, state.gradient(start, stop), state.damped(start, stop), store_scale)
        for start, stop in blocks:
            gradient, damped = state.gradient(start, stop), state.damped(start, stop)
            if not large_groups and refits:
                _refit_scales(state, start, stop, gradient, damped, store_scale)
            loops.descend(
                gradient.numpy(),
                damped.numpy(),
                torch.argsort(importance[start:stop], descending=True, stable=True).numpy(),
                state.change[start:stop].numpy(),
                state.codes[start:stop].numpy(),
                state.scale.numpy(),
                state.zero_point.numpy(),
                start,
                group_size,
                np.float32(qmin),
                np.float32(qmax),
                np.float32(spacing.fraction),
                np.float32(spacing.least),
                options.sweeps,
                state.gain.numpy(),
                aligned((TILE_ROWS * (stop - start),), np.float32),
                aligned((TILE_ROWS * (PANEL_COLUMNS + 1),), np.float32),
            )
    return Polished(
        codes=state.codes.T.contiguous(),
        scale=state.scale.T.contiguous(),
        row_gain=state.gain - damping_before + _row_energy(state.change, damping),
    )


@dataclass(slots=True, kw_only=True)
class _State:
    """One matrix while it is polished, transposed so that a column of the weight is contiguous.

    ``change`` is D = W - Q [K, N]; ``codes`` [K, N]; ``scale`` and ``zero_point`` [G, N]; ``gain`` [N].
    """

    hessian: Tensor
    damping: Tensor
    change: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group_size: int
    gain: Tensor

    def gradient(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of (H + damping) D, [stop - start, N]: minus half the loss's slope."""
        return (self.hessian[start:stop] @ self.change).addcmul_(self.damping[start:stop, None], self.change[start:stop])

    def damped(self, start: int, stop: int) -> Tensor:
        """The diagonal block start..stop of the damped Hessian."""
        block = self.hessian[start:stop, start:stop].clone()
        block.diagonal().add_(self.damping[start:stop])
        return block


def _blocks(columns: int, group_size: int) -> list[tuple[int, int]]:
    """Runs of whole groups, or of parts of one group, of about ``BLOCK`` columns."""
    if group_size > BLOCK:
        starts = [s for g in range(0, columns, group_size) for s in range(g, g + group_size, BLOCK)]
    else:
        starts = list(range(0, columns, group_size * (BLOCK // group_size)))
    return list(zip(starts, [*starts[1:], columns], strict=True))


def _by_importance(blocks: list[tuple[int, int]], importance: Tensor) -> list[tuple[int, int]]:
    """The most used block first; equal ones by position."""
    used = importance.numpy()
    return sorted(blocks, key=lambda block: (-float(used[block[0] : block[1]].max()), block))


def _row_energy(change: Tensor, damping: Tensor) -> Tensor:
    """The damping's own part of each row's loss, sum_j damping_j D_j^2, F64 [N]."""
    return (change.square() * damping[:, None]).sum(0).to(torch.float64)


def _per_column(rows: Tensor, group_size: int) -> Tensor:
    return rows.repeat_interleave(group_size, 0)


def _refit_scales(state: _State, start: int, stop: int, gradient: Tensor, damped: Tensor, store_scale: StoreScale) -> None:
    """Move the scale of each group in start..stop to its best stored value; gradient and change follow.

    A scale that would change sign, vanish, or not fit the stored type stays as it is.
    """
    for first in range(start, stop, state.group_size):
        last = first + state.group_size
        group = first // state.group_size
        level = state.codes[first:last].to(torch.float32) - state.zero_point[group]
        pull = damped[:, first - start : last - start] @ level
        inside = slice(first - start, last - start)
        numerator, curvature = torch.empty_like(level[0]), torch.empty_like(level[0])
        loops.slopes(level.numpy(), pull[inside].numpy(), gradient[inside].numpy(), numerator.numpy(), curvature.numpy())
        old = state.scale[group]
        best = old + torch.where(curvature > 0, numerator / curvature, torch.zeros_like(old))
        new = store_scale(torch.where(torch.isfinite(best), best, old)).to(torch.float32)
        new = torch.where(torch.isfinite(new) & (new * old.sign() > 0), new, old)
        step = new - old
        fall = step * (2 * numerator - step * curvature)
        taken = fall > 0
        step = torch.where(taken, step, torch.zeros_like(step))
        state.gain += torch.where(taken, fall, torch.zeros_like(fall))
        state.scale[group] = torch.where(taken, new, old)
        gradient.addcmul_(pull, step, value=-1)
        state.change[first:last].addcmul_(level, step, value=-1)

"""Coordinate descent on codes and scales, batched on a card; ``quant.gptq.polish`` has the reasons.

Every matrix visits its blocks in its own order of importance, as on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorsurgeon.quant.gptq.polish import BLOCK, Polish, Polished
from tensorsurgeon.quant.gptq.scale_search import StoreScale


@dataclass(slots=True, kw_only=True)
class _State:
    """``change`` is W - Q [B, R, K]; ``gain`` [B, R]; ``zero`` None for a symmetric grid."""

    hessian: Tensor
    damping: Tensor
    importance: Tensor
    change: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int
    gain: Tensor
    store_scale: StoreScale


def polish(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    damping: Tensor,
    qmin: int,
    qmax: int,
    group_size: int,
    store_scale: StoreScale,
    options: Polish,
    loops: Any,
) -> Polished:
    """Codes and scales with no more output error than those given; ``codes`` is written over, and so is ``scale``."""
    batch, rows, columns = weight.shape
    group_size = columns if group_size == -1 else group_size
    state = _State(
        hessian=hessian, damping=damping, importance=hessian.diagonal(dim1=1, dim2=2) + damping,
        change=weight - _dequantized(codes, scale, zero_point), codes=codes, scale=scale.clone(), zero=zero_point,
        group_size=group_size, gain=torch.zeros(batch, rows, device=weight.device), store_scale=store_scale,
    )  # fmt: skip
    before = _damping_energy(state)
    for _ in range(options.rounds):
        if group_size > BLOCK:
            for cut in _cuts(state, group_size):
                _refit(state, cut, cut.gradient(state), cut.damped(state))
        for cut in _cuts(state, min(columns, group_size * (BLOCK // group_size)) if group_size <= BLOCK else BLOCK):
            gradient, damped = cut.gradient(state), cut.damped(state)
            if group_size <= BLOCK:
                _refit(state, cut, gradient, damped)
            order = torch.argsort(cut.of(state.importance[:, None])[:, 0], dim=1, descending=True, stable=True)
            loops.descend(
                gradient.contiguous(), damped.contiguous(), order.int(), state.codes, state.change, state.scale, state.zero,
                state.gain, cut.starts, group_size, qmin, qmax, options.sweeps,
            )  # fmt: skip
    return Polished(codes=state.codes, scale=state.scale, row_gain=state.gain - before + _damping_energy(state))


@dataclass(frozen=True, slots=True)
class _Cut:
    """A run of ``width`` columns of each matrix, from ``starts`` int32 [B] on; ``start`` where all begin at the same."""

    starts: Tensor
    width: int
    start: int | None

    def _index(self) -> Tensor:
        return self.starts.long()[:, None] + torch.arange(self.width, device=self.starts.device)

    def of(self, matrix: Tensor) -> Tensor:
        """These columns of [B, ., K]: a view where all begin at the same, else a copy."""
        if self.start is not None:
            return matrix[:, :, self.start : self.start + self.width]
        return torch.gather(matrix, 2, self._index()[:, None, :].expand(-1, matrix.shape[1], -1))

    def put(self, matrix: Tensor, values: Tensor) -> None:
        """Write these columns of [B, ., K]."""
        if self.start is not None:
            matrix[:, :, self.start : self.start + self.width] = values
        else:
            matrix.scatter_(2, self._index()[:, None, :].expand(-1, matrix.shape[1], -1), values)

    def gradient(self, state: _State) -> Tensor:
        """(H + damping) D for these columns, [B, R, W]: minus half the loss's slope."""
        made = torch.bmm(state.change, self.of(state.hessian))
        return made.addcmul_(self.of(state.change), self.of(state.damping[:, None]))

    def damped(self, state: _State) -> Tensor:
        """The diagonal block of the damped Hessian, [B, W, W]; a new tensor."""
        rows = self.of(state.hessian)
        if self.start is not None:
            block = rows[:, self.start : self.start + self.width].clone()
        else:
            block = torch.gather(rows, 1, self._index()[:, :, None].expand(-1, -1, self.width))
        block.diagonal(dim1=1, dim2=2).add_(self.of(state.damping[:, None])[:, 0])
        return block

    def part(self, first: int, width: int) -> _Cut:
        """Columns of this run, counted from its start."""
        return _Cut(self.starts + first, width, None if self.start is None else self.start + first)


def _cuts(state: _State, width: int) -> list[_Cut]:
    """Runs of ``width`` columns, each matrix's most used first; several whose last is shorter go in the order of columns."""
    batch, columns = state.importance.shape
    device = state.importance.device
    starts = torch.arange(0, columns, width, device=device)
    # What is missing from the last run is used by nobody.
    padded = torch.nn.functional.pad(state.importance, (0, -columns % width))
    most = padded.view(batch, -1, width).amax(2)
    if batch > 1 and columns % width:
        order = starts.expand(batch, -1)
    else:
        order = torch.argsort(most, dim=1, descending=True, stable=True) * width
    is_common = batch == 1 or bool(columns % width)
    common = order[0].tolist() if is_common else [None] * order.shape[1]
    widths = [width if start is None else min(width, columns - start) for start in common]
    return [_Cut(order[:, n].int().contiguous(), widths[n], common[n]) for n in range(order.shape[1])]


def _refit(state: _State, cut: _Cut, gradient: Tensor, damped: Tensor) -> None:
    """Move the scale of each group in a run of columns to its best stored value; gradient and change follow.

    A scale that would change sign, vanish, or not fit the stored type stays as it is.
    """
    size = state.group_size
    for first in range(0, cut.width, size):
        part = cut.part(first, size)
        inside = slice(first, first + size)
        where = (part.starts.long() // size)[:, None, None].expand(-1, state.scale.shape[1], 1)
        level = part.of(state.codes).float()
        if state.zero is not None:
            level = level - torch.gather(state.zero, 2, where)
        pull = torch.bmm(level, damped[:, inside])
        numerator, curvature = (level * gradient[:, :, inside]).sum(2), (level * pull[:, :, inside]).sum(2)
        old = torch.gather(state.scale, 2, where)[..., 0]
        best = old + torch.where(curvature > 0, numerator / curvature, torch.zeros_like(old))
        new = state.store_scale(torch.where(torch.isfinite(best), best, old)).float()
        new = torch.where(torch.isfinite(new) & (new * old.sign() > 0), new, old)
        step = new - old
        fall = step * (2 * numerator - step * curvature)
        taken = fall > 0
        step = torch.where(taken, step, torch.zeros_like(step))
        state.gain += torch.where(taken, fall, torch.zeros_like(fall))
        state.scale.scatter_(2, where, torch.where(taken, new, old)[..., None])
        gradient.addcmul_(pull, step[..., None], value=-1)
        part.put(state.change, part.of(state.change).addcmul(level, step[..., None], value=-1))


def _dequantized(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    level = codes.view(*scale.shape, -1).float()
    if zero is not None:
        level = level - zero[..., None]
    return (level * scale[..., None]).view(codes.shape)


def _damping_energy(state: _State) -> Tensor:
    """The damping's own part of each row's loss, [B, R]."""
    return torch.bmm(state.change.square(), state.damping[:, :, None])[..., 0]

"""The three loops that torch has no product for, as Triton kernels: a tile of rows each, columns one after another.

Everything is row-major: [B, R, K] for B Hessians, R rows that share each and K columns. Triton comes with torch for CUDA;
``loops`` says the same in plain torch.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_SEARCH_ROWS: Final = 16
_ROWS: Final = 32
_SEARCH_COLUMNS: Final = 128


@triton.jit
def _rint(x):
    # To the nearest, ties to even, for anything that a code can be; what is larger is clamped anyway.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _best_candidate(
    weight, candidates, zero, importance, out, rows, columns, groups, stride, qmin, qmax,
    SIZE: tl.constexpr, COUNT: tl.constexpr, HAS_ZERO: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    g = tl.program_id(2)
    row = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    ok = row < rows
    at = (b * rows + row) * groups + g
    offset = tl.zeros((TILE,), tl.float32)
    if HAS_ZERO:
        offset = tl.load(zero + at, mask=ok, other=0.0)
    best = tl.full((TILE,), float("inf"), tl.float32)
    chosen = tl.load(candidates + at, mask=ok, other=1.0)
    for c in range(COUNT):
        scale = tl.load(candidates + c * stride + at, mask=ok, other=1.0)
        inverse = tl.div_rn(tl.full((TILE,), 1.0, tl.float32), tl.where(scale == 0.0, 1.0, scale))
        error = tl.zeros((TILE,), tl.float32)
        for first in range(0, SIZE, WIDTH):
            inside = first + tl.arange(0, WIDTH)
            k = g * SIZE + inside
            used = inside < SIZE
            w = tl.load(weight + (b * rows + row[:, None]) * columns + k[None, :], mask=ok[:, None] & used[None, :], other=0.0)
            cost = tl.load(importance + b * columns + k, mask=used, other=0.0)
            level = tl.minimum(tl.maximum(_rint(w * inverse[:, None] + offset[:, None]), qmin), qmax)
            off = w - (level - offset[:, None]) * scale[:, None]
            error += tl.sum(cost[None, :] * (off * off), axis=1)
        take = error < best
        best = tl.where(take, error, best)
        chosen = tl.where(take, scale, chosen)
    tl.store(out + at, chosen, mask=ok)


@triton.jit
def _column_loop(
    weight, owed, lower, added, scale, zero, group, codes, residual, loss, rows, columns, groups, start, qmin, qmax,
    COUNT: tl.constexpr, HAS_ZERO: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    ok = row < rows
    k = tl.arange(0, WIDTH)
    used = k < COUNT
    here = ok[:, None] & used[None, :]
    at = (b * rows + row[:, None]) * columns + start + k[None, :]
    w = tl.load(weight + at, mask=here, other=0.0)
    sums = tl.load(owed + (b * rows + row[:, None]) * COUNT + k[None, :], mask=here, other=0.0)
    total = tl.zeros((TILE,), tl.float32)
    code = tl.zeros((TILE, WIDTH), tl.float32)
    rest = tl.zeros((TILE, WIDTH), tl.float32)
    for i in range(COUNT):
        j = COUNT - 1 - i
        pick = k == j
        line = tl.load(lower + (b * columns + start + j) * columns + start + k, mask=used, other=0.0)
        pivot = tl.sum(tl.where(pick, line, 0.0), axis=0)
        extra = tl.load(added + b * columns + start + j)
        cell = (b * rows + row) * groups + tl.load(group + b * columns + start + j)
        size = tl.load(scale + cell, mask=ok, other=1.0)
        offset = tl.zeros((TILE,), tl.float32)
        if HAS_ZERO:
            offset = tl.load(zero + cell, mask=ok, other=0.0)
        divisor = tl.where(size == 0.0, 1.0, size)
        sum_j = tl.sum(tl.where(pick[None, :], sums, 0.0), axis=1)
        w_j = tl.sum(tl.where(pick[None, :], w, 0.0), axis=1)
        wanted = w_j + tl.div_rn(sum_j, tl.broadcast_to(pivot, sum_j.shape))
        level = tl.minimum(tl.maximum(_rint(tl.div_rn(wanted, divisor) + offset), qmin), qmax)
        rest_j = w_j - (level - offset) * size
        off = sum_j + rest_j * pivot
        total += off * off - extra * rest_j * rest_j
        code = tl.where(pick[None, :], level[:, None], code)
        rest = tl.where(pick[None, :], rest_j[:, None], rest)
        # Columns from j on are looked at no more, so it does not matter what becomes of their sums.
        sums += rest_j[:, None] * line[None, :]
    tl.store(codes + at, code.to(tl.int8), mask=here)
    tl.store(residual + at, rest, mask=here)
    old = tl.load(loss + b * rows + row, mask=ok, other=0.0)
    tl.store(loss + b * rows + row, old + total, mask=ok)


@triton.jit
def _descend(
    gradient, damped, order, codes, change, scale, zero, gain, starts, rows, columns, groups, size_of_group,
    qmin, qmax, COUNT: tl.constexpr, SWEEPS: tl.constexpr, HAS_ZERO: tl.constexpr, ONE_GROUP: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    ok = row < rows
    start = tl.load(starts + b)
    k = tl.arange(0, WIDTH)
    used = k < COUNT
    here = ok[:, None] & used[None, :]
    at = (b * rows + row[:, None]) * columns + start + k[None, :]
    slope = tl.load(gradient + (b * rows + row[:, None]) * COUNT + k[None, :], mask=here, other=0.0)
    code = tl.load(codes + at, mask=here, other=0).to(tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    # Where the whole block is in one group, its scales are read once: the loop waits for every load in it.
    cell = (b * rows + row) * groups + start // size_of_group
    size = tl.load(scale + cell, mask=ok, other=1.0)
    offset = tl.zeros((TILE,), tl.float32)
    if HAS_ZERO:
        offset = tl.load(zero + cell, mask=ok, other=0.0)
    for i in range(SWEEPS * COUNT):
        j = tl.load(order + b * COUNT + i % COUNT)
        pick = k == j
        line = tl.load(damped + (b * COUNT + j) * COUNT + k, mask=used, other=0.0)
        curve = tl.sum(tl.where(pick, line, 0.0), axis=0)
        if not ONE_GROUP:
            cell = (b * rows + row) * groups + (start + j) // size_of_group
            size = tl.load(scale + cell, mask=ok, other=1.0)
            if HAS_ZERO:
                offset = tl.load(zero + cell, mask=ok, other=0.0)
        divisor = tl.where(size == 0.0, 1.0, size)
        slope_j = tl.sum(tl.where(pick[None, :], slope, 0.0), axis=1)
        code_j = tl.sum(tl.where(pick[None, :], code, 0.0), axis=1)
        wanted = (code_j - offset) * size + tl.div_rn(slope_j, tl.broadcast_to(curve, slope_j.shape))
        new = tl.minimum(tl.maximum(_rint(tl.div_rn(wanted, divisor) + offset), qmin), qmax)
        move = (new - code_j) * size
        fall = move * (2.0 * slope_j - move * curve)
        taken = fall > 0.0
        move = tl.where(taken, move, 0.0)
        total += tl.where(taken, fall, 0.0)
        code = tl.where(pick[None, :] & taken[:, None], new[:, None], code)
        slope -= move[:, None] * line[None, :]
    first = tl.load(codes + at, mask=here, other=0).to(tl.float32)
    cells = (b * rows + row[:, None]) * groups + (start + k[None, :]) // size_of_group
    sizes = tl.load(scale + cells, mask=here, other=0.0)
    before = tl.load(change + at, mask=here, other=0.0)
    tl.store(change + at, before - (code - first) * sizes, mask=here)
    tl.store(codes + at, code.to(tl.int8), mask=here)
    old = tl.load(gain + b * rows + row, mask=ok, other=0.0)
    tl.store(gain + b * rows + row, old + total, mask=ok)


def best_candidate(weight: Tensor, candidates: Tensor, zero: Tensor | None, importance: Tensor, qmin: int, qmax: int) -> Tensor:
    """See ``loops.best_candidate``."""
    count, batch, rows, groups = candidates.shape
    columns = weight.shape[2]
    size = columns // groups
    out = torch.empty_like(candidates[0])
    _best_candidate[(batch, triton.cdiv(rows, _SEARCH_ROWS), groups)](
        weight, candidates, candidates if zero is None else zero, importance, out, rows, columns, groups, batch * rows * groups,
        float(qmin), float(qmax), SIZE=size, COUNT=count, HAS_ZERO=zero is not None,
        WIDTH=min(_SEARCH_COLUMNS, triton.next_power_of_2(size)), TILE=_SEARCH_ROWS,
    )  # fmt: skip
    return out


def column_loop(
    weight: Tensor, owed: Tensor, lower: Tensor, added: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor,
    codes: Tensor, residual: Tensor, loss: Tensor, start: int, qmin: int, qmax: int,
) -> None:  # fmt: skip
    """See ``loops.column_loop``."""
    batch, rows, columns = weight.shape
    width = owed.shape[2]
    _column_loop[(batch, triton.cdiv(rows, _ROWS))](
        weight, owed, lower, added, scale, scale if zero is None else zero, group, codes, residual, loss, rows, columns,
        scale.shape[2], start, float(qmin), float(qmax), COUNT=width, HAS_ZERO=zero is not None,
        WIDTH=max(16, triton.next_power_of_2(width)), TILE=_ROWS, num_warps=4,
    )  # fmt: skip


def descend(
    gradient: Tensor, damped: Tensor, order: Tensor, codes: Tensor, change: Tensor, scale: Tensor, zero: Tensor | None,
    gain: Tensor, starts: Tensor, group_size: int, qmin: int, qmax: int, sweeps: int,
) -> None:  # fmt: skip
    """See ``loops.descend``."""
    batch, rows, columns = codes.shape
    width = gradient.shape[2]
    _descend[(batch, triton.cdiv(rows, _ROWS))](
        gradient, damped, order, codes, change, scale, scale if zero is None else zero, gain, starts, rows, columns,
        scale.shape[2], group_size, float(qmin), float(qmax), COUNT=width, SWEEPS=sweeps, HAS_ZERO=zero is not None,
        ONE_GROUP=group_size % width == 0, WIDTH=max(16, triton.next_power_of_2(width)), TILE=_ROWS, num_warps=4,
    )  # fmt: skip

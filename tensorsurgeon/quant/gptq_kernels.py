"""The compiled loops of ``hessian``, ``gptq`` and ``polish``: single-threaded, in a fixed order of operations.

Matrices are transposed, [K, N] for a weight [N, K], so that the innermost loop runs along rows of the weight, which do not
depend on each other: it is vectorised without any change to the order in which a number is summed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tensorsurgeon.quant.compiled import kernel

# Rows per tile: 128 columns x 64 rows of sums are 32 KB and stay in the L1 cache.
_TILE = 64
# Columns whose errors are handed on together: a third of the memory traffic of one at a time. Written out below.
_PANEL = 4


@kernel
def gather_lower(
    out: NDArray[np.float32], hessian: NDArray[np.float32], diagonal: NDArray[np.float32], order: NDArray[np.int64]
) -> None:
    """out[i, j] = H[order[i], order[j]] for j <= i, with the damped diagonal; zero above it."""
    size = order.shape[0]
    for i in range(size):
        source = hessian[order[i]]
        for j in range(i):
            out[i, j] = source[order[j]]
        out[i, i] = diagonal[order[i]]
        for j in range(i + 1, size):
            out[i, j] = 0.0


@kernel
def factor_panel(panel: NDArray[np.float32], inverse: NDArray[np.float32], diagonal: NDArray[np.float32], floor: float) -> bool:
    """Cholesky factor of one diagonal block, in place (zero above the diagonal), and the inverse of that factor."""
    size = panel.shape[0]
    upper = np.zeros((size, size), np.float64)
    for i in range(size):
        for j in range(i, size):
            upper[i, j] = panel[j, i]
    for k in range(size):
        if not upper[k, k] > floor * diagonal[k]:
            return False
        upper[k, k] = np.sqrt(upper[k, k])
        for j in range(k + 1, size):
            upper[k, j] /= upper[k, k]
        for i in range(k + 1, size):
            factor = upper[k, i]
            for j in range(i, size):
                upper[i, j] -= factor * upper[k, j]
    solved = np.zeros((size, size), np.float64)
    for i in range(size):
        solved[i, i] = 1.0
        for k in range(i):
            factor = upper[k, i]
            for j in range(k + 1):
                solved[i, j] -= factor * solved[k, j]
        for j in range(i + 1):
            solved[i, j] /= upper[i, i]
    for i in range(size):
        for j in range(size):
            panel[i, j] = upper[j, i]
            inverse[i, j] = solved[i, j]
    return True


@kernel
def take_columns(weight: NDArray[np.float32], order: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """out[i, n] = weight[n, order[i]]: [N, K] to [K, N], one pass, a cache line of rows at a time."""
    rows, columns = weight.shape
    for first in range(0, rows, 16):
        last = min(first + 16, rows)
        for i in range(columns):
            column = order[i]
            for n in range(first, last):
                out[i, n] = weight[n, column]


@kernel
def column_loop(
    original: NDArray[np.float32],
    owed: NDArray[np.float32],
    lower: NDArray[np.float32],
    added: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero_point: NDArray[np.float32],
    group: NDArray[np.int64],
    qmin: np.float32,
    qmax: np.float32,
    codes: NDArray[np.int8],
    residual: NDArray[np.float32],
    loss: NDArray[np.float64],
) -> None:
    """Quantize one block [B, N] of columns from its end; ``owed`` [B, N] is what columns outside it left behind.

    ``loss`` [N] gains (U^T D)^2, less the damping's part ``added`` D^2.
    No fastmath and a division, not a reciprocal: codes must be those of ``round_to_nearest``.
    """
    columns, rows = original.shape
    sums = np.empty((columns, _TILE), np.float32)
    for first in range(0, rows, _TILE):
        width = min(_TILE, rows - first)
        for k in range(columns):
            for n in range(width):
                sums[k, n] = owed[k, first + n]
        for stop in range(columns, 0, -_PANEL):
            start = max(0, stop - _PANEL)
            for k in range(stop - 1, start - 1, -1):
                pivot = lower[k, k]
                row_scale = scale[group[k], first : first + width]
                row_zero = zero_point[group[k], first : first + width]
                row_original = original[k, first : first + width]
                row_codes = codes[k, first : first + width]
                row_residual = residual[k, first : first + width]
                for n in range(width):
                    size = row_scale[n]
                    divisor = np.float32(1.0) if size == np.float32(0.0) else size
                    current = row_original[n] + sums[k, n] / pivot
                    level = min(max(np.rint(current / divisor + row_zero[n]), qmin), qmax)
                    row_residual[n] = row_original[n] - (level - row_zero[n]) * size
                    row_codes[n] = np.int16(level)
                for n in range(width):
                    off = sums[k, n] + row_residual[n] * pivot
                    loss[first + n] += off * off - added[k] * row_residual[n] * row_residual[n]
                for i in range(start, k):
                    weight = lower[k, i]
                    for n in range(width):
                        sums[i, n] += weight * row_residual[n]
            if start == 0:
                break
            r0 = residual[start, first : first + width]
            r1 = residual[start + 1, first : first + width]
            r2 = residual[start + 2, first : first + width]
            r3 = residual[start + 3, first : first + width]
            for i in range(start):
                w0, w1, w2, w3 = lower[start, i], lower[start + 1, i], lower[start + 2, i], lower[start + 3, i]
                for n in range(width):
                    sums[i, n] += (w0 * r0[n] + w1 * r1[n]) + (w2 * r2[n] + w3 * r3[n])


@kernel
def slopes(
    level: NDArray[np.float32],
    pull: NDArray[np.float32],
    gradient: NDArray[np.float32],
    numerator: NDArray[np.float32],
    curvature: NDArray[np.float32],
) -> None:
    """numerator = c.G and curvature = c.Hc of each row of the weight, summed over columns in order."""
    columns, rows = level.shape
    for n in range(rows):
        numerator[n] = 0.0
        curvature[n] = 0.0
    for k in range(columns):
        for n in range(rows):
            numerator[n] += level[k, n] * gradient[k, n]
            curvature[n] += level[k, n] * pull[k, n]


@kernel
def descend(
    gradient: NDArray[np.float32],
    damped: NDArray[np.float32],
    order: NDArray[np.int64],
    change: NDArray[np.float32],
    codes: NDArray[np.int8],
    scale: NDArray[np.float32],
    zero_point: NDArray[np.float32],
    start: int,
    group_size: int,
    qmin: np.float32,
    qmax: np.float32,
    sweeps: int,
    gain: NDArray[np.float64],
) -> None:
    """Move each code of one block to its best value given all others, columns in ``order``, ``sweeps`` times."""
    columns, rows = gradient.shape
    slope = np.empty((columns, _TILE), np.float32)
    steps = np.empty((_PANEL, _TILE), np.float32)
    fallen = np.empty(_TILE, np.float32)
    zero = np.float32(0.0)
    one = np.float32(1.0)
    two = np.float32(2.0)
    for first in range(0, rows, _TILE):
        width = min(_TILE, rows - first)
        for k in range(columns):
            for n in range(width):
                slope[k, n] = gradient[k, first + n]
        for sweep in range(sweeps):
            for begin in range(0, columns, _PANEL):
                end = min(begin + _PANEL, columns)
                moved = 0
                for place in range(begin, end):
                    k = order[place]
                    curvature = damped[k, k]
                    group = (start + k) // group_size
                    row_scale = scale[group, first : first + width]
                    row_zero = zero_point[group, first : first + width]
                    row_codes = codes[k, first : first + width]
                    row_change = change[k, first : first + width]
                    row_slope = slope[k]
                    step = steps[place - begin]
                    for n in range(width):
                        size = row_scale[n]
                        divisor = one if size == zero else size
                        code = np.float32(row_codes[n])
                        wanted = (code - row_zero[n]) * size + row_slope[n] / curvature
                        new = min(max(np.rint(wanted / divisor + row_zero[n]), qmin), qmax)
                        move = (new - code) * size
                        fall = move * (two * row_slope[n] - move * curvature)
                        taken = fall > zero
                        step[n] = move if taken else zero
                        fallen[n] = fall if taken else zero
                        row_change[n] -= step[n]
                        row_codes[n] = np.int16(new if taken else code)
                    for n in range(width):
                        gain[first + n] += fallen[n]
                        moved += fallen[n] > zero
                    for other in range(begin, end):
                        i = order[other]
                        coupling = damped[k, i]
                        for n in range(width):
                            slope[i, n] -= coupling * step[n]
                if moved == 0 or (sweep == sweeps - 1 and end == columns):
                    continue
                for k in range(end - begin, _PANEL):
                    steps[k, :width] = zero
                k0, k1 = order[begin], order[min(begin + 1, end - 1)]
                k2, k3 = order[min(begin + 2, end - 1)], order[min(begin + 3, end - 1)]
                # The panel's own slopes are up to date; those of columns that come later in the last sweep suffice there.
                for other in range(end if sweep == sweeps - 1 else 0, columns):
                    if begin <= other < end:
                        continue
                    i = order[other]
                    c0, c1, c2, c3 = damped[k0, i], damped[k1, i], damped[k2, i], damped[k3, i]
                    for n in range(width):
                        slope[i, n] -= (c0 * steps[0, n] + c1 * steps[1, n]) + (c2 * steps[2, n] + c3 * steps[3, n])

"""The compiled loops of ``quant.polish``: one thread, in a fixed order of operations.

Matrices are transposed, [K, N] for a weight [N, K], so that the innermost loop runs along rows of the weight, which do not
depend on each other: it is vectorised without any change to the order in which a number is summed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tensorsurgeon.quant.loops.compiled import kernel
from tensorsurgeon.quant.loops.levels import nearest
from tensorsurgeon.quant.loops.scratch import matrix
from tensorsurgeon.quant.loops.tiles import PANEL_COLUMNS, TILE_ROWS


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
    fraction: np.float32,
    apart: np.float32,
    sweeps: int,
    gain: NDArray[np.float64],
    slopes: NDArray[np.float32],
    steps: NDArray[np.float32],
) -> None:
    """Move each code of one block [B, N] to its best value given all others, columns in ``order``, ``sweeps`` times.

    ``slopes`` [TILE_ROWS B] and ``steps`` [TILE_ROWS (PANEL_COLUMNS + 1)] are written in.
    """
    columns, rows = gradient.shape
    slope = matrix(slopes, columns, TILE_ROWS)
    fallen = steps[PANEL_COLUMNS * TILE_ROWS :]
    moves = matrix(steps, PANEL_COLUMNS, TILE_ROWS)
    zero = np.float32(0.0)
    one = np.float32(1.0)
    two = np.float32(2.0)
    for first in range(0, rows, TILE_ROWS):
        width = min(TILE_ROWS, rows - first)
        for k in range(columns):
            for n in range(width):
                slope[k, n] = gradient[k, first + n]
        for sweep in range(sweeps):
            for begin in range(0, columns, PANEL_COLUMNS):
                end = min(begin + PANEL_COLUMNS, columns)
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
                    step = moves[place - begin]
                    for n in range(width):
                        size = row_scale[n]
                        divisor = one if size == zero else size
                        code = np.float32(row_codes[n])
                        wanted = (code - row_zero[n]) * size + row_slope[n] / curvature
                        new = nearest(wanted / divisor + row_zero[n], qmin, qmax, fraction, apart)
                        move = (new - code) * size
                        fall = move * (two * row_slope[n] - move * curvature)
                        taken = fall > zero
                        step[n] = move if taken else zero
                        fallen[n] = fall if taken else zero
                        row_change[n] -= step[n]
                        row_codes[n] = new if taken else code
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
                for k in range(end - begin, PANEL_COLUMNS):
                    moves[k, :width] = zero
                k0, k1 = order[begin], order[min(begin + 1, end - 1)]
                k2, k3 = order[min(begin + 2, end - 1)], order[min(begin + 3, end - 1)]
                # The panel's own slopes are up to date; those of columns that come later in the last sweep suffice there.
                for other in range(end if sweep == sweeps - 1 else 0, columns):
                    if begin <= other < end:
                        continue
                    i = order[other]
                    c0, c1, c2, c3 = damped[k0, i], damped[k1, i], damped[k2, i], damped[k3, i]
                    for n in range(width):
                        slope[i, n] -= (c0 * moves[0, n] + c1 * moves[1, n]) + (c2 * moves[2, n] + c3 * moves[3, n])

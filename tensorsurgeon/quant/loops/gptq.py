"""The compiled loops of ``quant.gptq``: one thread, in a fixed order of operations.

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
    fraction: np.float32,
    apart: np.float32,
    codes: NDArray[np.int8],
    residual: NDArray[np.float32],
    loss: NDArray[np.float64],
    scratch: NDArray[np.float32],
) -> None:
    """Quantize one block [B, N] of columns from its end; ``owed`` [B, N] is what columns outside it left behind.

    ``loss`` [N] gains (U^T D)^2, less the damping's part ``added`` D^2. ``scratch`` [TILE_ROWS B] is written in.
    No fastmath and a division, not a reciprocal: codes must be those of ``round_to_nearest``.
    """
    columns, rows = original.shape
    sums = matrix(scratch, columns, TILE_ROWS)
    for first in range(0, rows, TILE_ROWS):
        width = min(TILE_ROWS, rows - first)
        for k in range(columns):
            for n in range(width):
                sums[k, n] = owed[k, first + n]
        for stop in range(columns, 0, -PANEL_COLUMNS):
            start = max(0, stop - PANEL_COLUMNS)
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
                    level = nearest(current / divisor + row_zero[n], qmin, qmax, fraction, apart)
                    row_residual[n] = row_original[n] - (level - row_zero[n]) * size
                    row_codes[n] = level
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

"""The compiled loop of ``quant.scale_search``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tensorsurgeon.quant.loops.compiled import kernel
from tensorsurgeon.quant.loops.levels import nearest


@kernel
def best_candidate(
    weight: NDArray[np.float32],
    importance: NDArray[np.float32],
    candidates: NDArray[np.float32],
    zero_point: NDArray[np.float32],
    group_size: int,
    qmin: np.float32,
    qmax: np.float32,
    fraction: np.float32,
    apart: np.float32,
    best: NDArray[np.int64],
    scratch: NDArray[np.float32],
) -> None:
    """best[g, n] = the first of candidates[:, g, n] with the least weighted error; weight is [K, N].

    Multiplies by the reciprocal, which may round a tie the other way: it ranks scales, it does not choose codes. ``scratch``
    [3, T] is written in; T rows go together.
    """
    groups, rows = best.shape
    inverse, error, least = scratch[0], scratch[1], scratch[2]
    tile = scratch.shape[1]
    one = np.float32(1.0)
    for first in range(0, rows, tile):
        width = min(tile, rows - first)
        for group in range(groups):
            for candidate in range(candidates.shape[0]):
                scale = candidates[candidate, group, first : first + width]
                zero = zero_point[group, first : first + width]
                for n in range(width):
                    inverse[n] = one / scale[n] if scale[n] != 0 else one
                    error[n] = 0.0
                for k in range(group * group_size, (group + 1) * group_size):
                    used = importance[k]
                    row = weight[k, first : first + width]
                    for n in range(width):
                        level = nearest(row[n] * inverse[n] + zero[n], qmin, qmax, fraction, apart)
                        off = row[n] - (level - zero[n]) * scale[n]
                        error[n] += used * (off * off)
                for n in range(width):
                    if candidate == 0 or error[n] < least[n]:
                        least[n] = error[n]
                        best[group, first + n] = candidate

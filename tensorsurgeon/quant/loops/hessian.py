"""The compiled loops of ``quant.gptq.hessian``: one thread, in a fixed order of operations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tensorsurgeon.quant.loops.compiled import kernel


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
def factor_panel(
    panel: NDArray[np.float32],
    inverse: NDArray[np.float32],
    diagonal: NDArray[np.float32],
    floor: float,
    scratch: NDArray[np.float64],
) -> bool:
    """Cholesky factor of one diagonal block [B, B], in place (zero above the diagonal), and the inverse of that factor.

    ``scratch``: [2, B, B].
    """
    size = panel.shape[0]
    upper, solved = scratch[0], scratch[1]
    for i in range(size):
        for j in range(size):
            upper[i, j] = panel[j, i] if j >= i else 0.0
            solved[i, j] = 0.0
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

"""GPTQ (Frantar et al., arXiv 2210.17323): codes chosen one input column at a time, each column's error made up for by
the columns that come after it.

Usual statements form the inverse Hessian and its Cholesky factor and push every error to the right. Here ``H = U U^T`` is
factored once (``hessian.flipped_cholesky``), nothing is inverted, and each block of columns pulls in what it needs: with
``D = W - Q`` the *original* weight's change so far, column ``j`` is rounded at

    w_j + (D_{<j} U_{<j,j}) / U_jj

which is the same number. As ``tr(D H D^T) = |D U|^2``, the loss falls out of the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensorsurgeon.errors import NumericError
from tensorsurgeon.quant.hessian import ActOrder, FlippedFactor, flipped_cholesky
from tensorsurgeon.quant.polish import Polish, polish
from tensorsurgeon.quant.scale_search import (
    ScaleSearch,
    StoreScale,
    check_grid,
    code_dtype,
    dequantize,
    round_to_nearest,
    search_scale,
    stored,
    zero_rows,
)

# Rows per tile of the column loop: a tile of 128 columns x 64 rows of sums is 32 KB and stays in the L1 cache.
_TILE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqOptions:
    """How GPTQ is run; all of it is part of the result's bits.

    ``damp_percent``: share of the Hessian's mean diagonal added to it; raised by itself where it is not enough.
    ``block_size``: columns per matrix product.
    ``act_order``: ``static`` quantizes the most used columns first with groups as they lie on disk (no g_idx).
    ``search``: search scales weighted by the Hessian's diagonal first; None keeps the scales given.
    ``polish``: rounds of coordinate descent and scale refit afterwards; None for none.
    ``measure_energy``: also compute tr(W H W^T), which ``relative_loss`` needs: one more product of GPTQ's own size.
    """

    damp_percent: float = 0.01
    block_size: int = 128
    act_order: ActOrder = "static"
    search: ScaleSearch | None = field(default_factory=ScaleSearch)
    polish: Polish | None = None
    measure_energy: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqResult:
    """Codes and scales, and how far the layer's output moved on the calibration tokens.

    ``codes``: [N, K] in [qmin, qmax], int8 where the range fits, else int16; ``scale``: F32 [N, G], as stored.
    ``loss``: tr(D H D^T), D = W - dequantized; ``relative_loss``: that over tr(W H W^T), None where not measured.
    ``method``: ``rtn`` where the Hessian saw no token, and rounding to nearest is all that can be done.
    ``damp_percent``: the damping that was needed.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    loss: float
    relative_loss: float | None
    method: Literal["gptq", "rtn"]
    damp_percent: float

    def dequantize(self) -> Tensor:
        """(codes - zero_point) * scale, F32 [N, K]."""
        return dequantize(self.codes, self.scale, self.zero_point)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    scale: Tensor,
    zero_point: Tensor | None = None,
    qmin: int,
    qmax: int,
    group_size: int,
    options: GptqOptions | None = None,
    store_scale: StoreScale,
    factor: FlippedFactor | None = None,
) -> GptqResult:
    """Quantize ``weight`` [N, K] F32 so that the layer's output on the tokens behind ``hessian`` [K, K] moves least.

    Matrices that share a Hessian are stacked as rows, and cost one factorisation between them; those that cannot be in
    memory together share one through ``factor`` (of the same Hessian, damping and order).
    ``scale`` [N, G] is the base scale of each group (it may be negative), ``zero_point`` [N, G] lies in [qmin, qmax];
    ``store_scale`` rounds scales to what the format stores, and codes are chosen for that. ``group_size`` -1 is one
    group per row.
    Raises NumericError for weights, scales or a Hessian that are not finite.
    """
    options = options or GptqOptions()
    check_grid(weight, scale, zero_point, group_size)
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise NumericError(f"Hessian is {tuple(hessian.shape)}, the weight has {weight.shape[1]} input columns")
    if factor is None:
        factor = flipped_cholesky(hessian, options.damp_percent, options.act_order)
    zero = None if zero_point is None else zero_point.to(torch.float32)
    grid: dict[str, Any] = {"qmin": qmin, "qmax": qmax, "group_size": group_size}
    if options.search is not None:
        importance = None if factor is None else factor.diagonal
        scale = search_scale(
            weight, scale, zero, importance=importance, store_scale=store_scale, options=options.search, **grid
        )
    scale = stored(scale, store_scale)
    if factor is None:
        codes = round_to_nearest(weight, scale, zero, qmin=qmin, qmax=qmax)
        return GptqResult(
            codes=codes, scale=scale, zero_point=zero_point, loss=0.0, relative_loss=None, method="rtn",
            damp_percent=options.damp_percent,
        )  # fmt: skip
    codes, residual, loss = _quantize_columns(weight, factor, scale, zero, block_size=options.block_size, **grid)
    added = factor.diagonal - hessian.diagonal()
    if options.polish is not None:
        polished = polish(
            weight, hessian, codes, scale, zero, damping=added, store_scale=store_scale, options=options.polish, **grid
        )
        codes, scale, loss = polished.codes, polished.scale, loss - polished.gain
        residual = weight - dequantize(codes, scale, zero)
    # The loop's loss is that of the damped Hessian; the damping's own part is known exactly.
    plain_loss = max(0.0, loss - float(column_energy(residual) @ added.double().numpy()))
    energy = output_energy(weight, hessian) if options.measure_energy else 0.0
    return GptqResult(
        codes=codes, scale=scale, zero_point=zero_point, loss=plain_loss,
        relative_loss=plain_loss / energy if energy > 0 else None, method="gptq", damp_percent=factor.damp_percent,
    )  # fmt: skip


def output_energy(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H W^T): the squared length of the layer's output over the tokens behind ``hessian``."""
    return float(((weight @ hessian) * weight).numpy().sum(dtype=np.float64))


def column_energy(matrix: Tensor) -> NDArray[np.float64]:
    """Squared length of each column, F64 [K]."""
    return np.square(matrix.numpy()).sum(axis=0, dtype=np.float64)


def _quantize_columns(
    weight: Tensor,
    factor: FlippedFactor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    qmin: int,
    qmax: int,
    group_size: int,
    block_size: int,
) -> tuple[Tensor, Tensor, float]:
    """Codes [N, K], W - Q [N, K], and the loss on the damped Hessian.

    Works transposed, so that one column of the weight is contiguous and the tile kernel runs along rows.
    """
    rows, columns = weight.shape
    group_size = columns if group_size == -1 else group_size
    group = (factor.order // group_size).numpy()
    original = weight.T.contiguous().index_select(0, factor.order)
    residual = torch.empty_like(original)
    codes = torch.empty(columns, rows, dtype=code_dtype(qmin, qmax))
    scale_rows = scale.T.contiguous()
    zero = zero_rows(zero_point, scale_rows.shape).numpy()
    loss = np.zeros(rows, np.float64)
    # The factor is flipped, so the column to visit first is the last.
    for stop in range(columns, 0, -block_size):
        start = max(0, stop - block_size)
        owed = factor.lower[stop:, start:stop].T @ residual[stop:]
        _column_loop(
            original[start:stop].numpy(),
            owed.numpy(),
            factor.lower[start:stop, start:stop].contiguous().numpy(),
            scale_rows.numpy(),
            zero,
            group[start:stop],
            np.float32(qmin),
            np.float32(qmax),
            codes[start:stop].numpy(),
            residual[start:stop].numpy(),
            loss,
        )
    back = torch.argsort(factor.order)
    return codes[back].T.contiguous(), residual[back].T.contiguous(), float(loss.sum())


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _column_loop(
    original: NDArray[np.float32],
    owed: NDArray[np.float32],
    lower: NDArray[np.float32],
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

    No fastmath and a division, not a reciprocal: codes must be those of ``round_to_nearest``.
    """
    columns, rows = original.shape
    sums = np.empty((columns, _TILE), np.float32)
    for first in range(0, rows, _TILE):
        width = min(_TILE, rows - first)
        for k in range(columns):
            for n in range(width):
                sums[k, n] = owed[k, first + n]
        for k in range(columns - 1, -1, -1):
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
                loss[first + n] += off * off
            for i in range(k):
                weight = lower[k, i]
                for n in range(width):
                    sums[i, n] += weight * row_residual[n]

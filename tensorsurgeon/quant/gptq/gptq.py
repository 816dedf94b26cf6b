"""GPTQ (Frantar et al., arXiv 2210.17323): codes chosen one input column at a time, each column's error made up for by
the columns that come after it.

Usual statements form the inverse Hessian and its Cholesky factor and push every error to the right. Here ``H = U U^T`` is
factored once (``hessian.flipped_cholesky``), nothing is inverted, and each block of columns pulls in what it needs: with
``D = W - Q`` the *original* weight's change so far, column ``j`` is rounded at

    w_j + (D_{<j} U_{<j,j}) / U_jj

which is the same number. As ``tr(D H D^T) = |D U|^2``, the loss falls out of the loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.errors import NumericError
from tensorsurgeon.quant.gptq.hessian import ActOrder, FlippedFactor, damp_for_tokens, flipped_cholesky
from tensorsurgeon.quant.gptq.levels import EVEN, Spacing, code_dtype
from tensorsurgeon.quant.gptq.polish import Polish, polish
from tensorsurgeon.quant.gptq.scale_search import (
    ScaleSearch,
    StoreScale,
    check_grid,
    dequantize,
    round_to_nearest,
    search_scale,
    stored,
    zero_rows,
)
from tensorsurgeon.quant.loops import gptq as loops
from tensorsurgeon.quant.loops.tiles import TILE_ROWS
from tensorsurgeon.quant.threads import one_torch_thread
from tensorsurgeon.tensors.arrays import aligned

# Rows that share a Hessian and go together as one weight: more fall out of the cache (a third slower at 4,096).
STACK_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqOptions:
    """How GPTQ is run; all of it is part of the result's bits.

    ``damp_percent``: share of the Hessian's mean diagonal added to it; raised where tokens are few
    (``hessian.damp_for_tokens``) and where it does not suffice for a factorisation.
    ``block_size``: columns per matrix product.
    ``act_order``: ``static`` quantizes the most used columns first with groups as they lie on disk (no g_idx).
    ``search``: search scales first, weighted by what an error in each column costs; None keeps the scales given.
    ``polish``: rounds of coordinate descent and scale refit afterwards; None for none.
    ``measure_energy``: also compute tr(W H W^T), which ``relative_loss`` needs: a product twice the size of GPTQ's own.
    """

    damp_percent: float = 0.01
    block_size: int = 128
    act_order: ActOrder = "static"
    search: ScaleSearch | None = field(default_factory=ScaleSearch)
    polish: Polish | None = None
    measure_energy: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 1 or not 0.0 <= self.damp_percent < math.inf:
            raise NumericError(
                f"block_size {self.block_size} must be at least 1 and damp_percent {self.damp_percent} finite, not negative"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqResult:
    """Codes and scales, and how far the layer's output moved on the calibration tokens.

    ``codes``: [N, K] levels in [qmin, qmax] in the grid's ``code_dtype``; ``scale``: F32 [N, G], as stored.
    ``row_loss``: F64 [N], the diagonal of D H D^T, D = W - dequantized; ``row_energy``: that of W H W^T, where measured.
    ``method``: ``rtn`` where the Hessian saw no token, and rounding to nearest is all that can be done.
    ``damp_percent``: the damping that was used.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    row_loss: Tensor
    row_energy: Tensor | None
    method: Literal["gptq", "rtn"]
    damp_percent: float

    @property
    def loss(self) -> float:
        """tr(D H D^T)."""
        return _total(self.row_loss)

    @property
    def relative_loss(self) -> float | None:
        """tr(D H D^T) / tr(W H W^T); None where that was not measured, or is 0."""
        energy = 0.0 if self.row_energy is None else _total(self.row_energy)
        return self.loss / energy if energy > 0.0 else None

    def dequantize(self) -> Tensor:
        """(codes - zero_point) * scale, F32 [N, K]."""
        return dequantize(self.codes, self.scale, self.zero_point)


@one_torch_thread()
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
    tokens: int | None = None,
    factor: FlippedFactor | None = None,
    spacing: Spacing = EVEN,
    keep_scales: bool = False,
) -> GptqResult:
    """Quantize ``weight`` [N, K] F32 so that the layer's output on the tokens behind ``hessian`` [K, K] moves least.

    ``scale`` [N, G] is the base scale of each group (it may be negative), ``zero_point`` [N, G] lies in [qmin, qmax];
    ``store_scale`` rounds scales to what the format stores, and codes are chosen for that. ``group_size`` -1 is one
    group per row. ``tokens``, how many the Hessian sums, guards against fitting the noise of too few.
    Matrices that share a Hessian share one factorisation: stacked as rows, ``STACK_ROWS`` at a time, or through ``factor``,
    the ``flipped_cholesky`` of the same Hessian, whose damping and order then stand.
    ``spacing``: where the levels from ``qmin`` to ``qmax`` lie, those of integers if nothing is said. ``keep_scales``: scales
    stay as they are, for other rows have them too.
    Raises NumericError for weights, scales or a Hessian that are not finite or do not fit each other.
    """
    options = options or GptqOptions()
    check_grid(weight, scale, zero_point, group_size)
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise NumericError(f"Hessian is {tuple(hessian.shape)}, the weight has {weight.shape[1]} input columns")
    if factor is None:
        damp_percent = damp_for_tokens(options.damp_percent, tokens, weight.shape[1])
        factor = flipped_cholesky(hessian, damp_percent, options.act_order)
    if options.search is not None and not keep_scales:
        scale = search_scale(
            weight, scale, zero_point, qmin=qmin, qmax=qmax, group_size=group_size, store_scale=store_scale,
            # Column j's rounding error e costs (U_jj e)^2 once later columns have made up for it: so weigh by that, not
            # by the diagonal itself, which charges for what will be made up (0.0032 against 0.0037 on the yardstick).
            importance=None if factor is None else factor.column_cost(), options=options.search, spacing=spacing,
        )  # fmt: skip
    else:
        scale = stored(scale, store_scale)
    if factor is None:
        return GptqResult(
            codes=round_to_nearest(weight, scale, zero_point, qmin=qmin, qmax=qmax, spacing=spacing), scale=scale,
            zero_point=zero_point, row_loss=torch.zeros(weight.shape[0], dtype=torch.float64), row_energy=None, method="rtn",
            damp_percent=options.damp_percent,
        )  # fmt: skip
    added = factor.diagonal - hessian.diagonal()
    codes, loss = _quantize_columns(weight, factor, added, scale, zero_point, qmin, qmax, spacing, group_size, options.block_size)
    if options.polish is not None:
        polished = polish(
            weight, hessian, codes, scale, zero_point, damping=added, qmin=qmin, qmax=qmax, group_size=group_size,
            store_scale=store_scale, options=options.polish, spacing=spacing, keep_scales=keep_scales,
        )  # fmt: skip
        codes, scale, loss = polished.codes, polished.scale, loss - polished.row_gain
    return GptqResult(
        codes=codes, scale=scale, zero_point=zero_point, row_loss=loss.clamp_(min=0.0),
        row_energy=output_energy(weight, hessian) if options.measure_energy else None, method="gptq",
        damp_percent=factor.damp_percent,
    )  # fmt: skip


def output_energy(weight: Tensor, hessian: Tensor) -> Tensor:
    """The diagonal of W H W^T, F64 [N]: the squared length of each output over the tokens behind ``hessian``."""
    return ((weight @ hessian) * weight).to(torch.float64).sum(1)


def _total(rows: Tensor) -> float:
    # NumPy's order of summation is fixed; that of torch over a long vector depends on its threads.
    return float(rows.numpy().sum())


def _quantize_columns(
    weight: Tensor,
    factor: FlippedFactor,
    added: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    spacing: Spacing,
    group_size: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Codes [N, K], and the loss on the undamped Hessian, F64 [N]; ``added`` [K] is what damping added.

    Works transposed, so that one column of the weight is contiguous and the tile kernel runs along rows.
    """
    rows, columns = weight.shape
    group = (factor.order // (columns if group_size == -1 else group_size)).numpy()
    original = torch.empty(columns, rows)
    loops.take_columns(weight.contiguous().numpy(), factor.order.numpy(), original.numpy())
    residual = torch.empty_like(original)
    codes = torch.empty(columns, rows, dtype=code_dtype(qmin, qmax, spacing))
    scale_rows = scale.T.contiguous()
    zero = zero_rows(zero_point, scale_rows.shape).numpy()
    added_in_order = added[factor.order].numpy()
    loss = torch.zeros(rows, dtype=torch.float64)
    sums = aligned((TILE_ROWS * min(block_size, columns),), np.float32)
    # The factor is flipped, so the column to visit first is the last.
    for stop in range(columns, 0, -block_size):
        start = max(0, stop - block_size)
        owed = factor.lower[stop:, start:stop].T @ residual[stop:]
        loops.column_loop(
            original[start:stop].numpy(),
            owed.numpy(),
            factor.lower[start:stop, start:stop].contiguous().numpy(),
            added_in_order[start:stop],
            scale_rows.numpy(),
            zero,
            group[start:stop],
            np.float32(qmin),
            np.float32(qmax),
            np.float32(spacing.fraction),
            np.float32(spacing.least),
            codes[start:stop].numpy(),
            residual[start:stop].numpy(),
            loss.numpy(),
            sums,
        )
    return codes[torch.argsort(factor.order)].T.contiguous(), loss

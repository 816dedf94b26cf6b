"""Search each group's scale for the least squared rounding error, each input column weighted by what errors there cost.

Before GPTQ the weights are ``FlippedFactor.column_cost``; with the Hessian's diagonal this is the ``imatrix`` method of
rounding to nearest, and without weights the clipping search that needs no data. A smaller scale clips the largest weights
of a group and rounds all others finer. The zero point does not move: min and max shrink alike, and it is a ratio of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.errors import NumericError
from tensorsurgeon.quant.gptq.levels import EVEN, Spacing, code_dtype, nearest_levels
from tensorsurgeon.quant.loops import scale_search as loops
from tensorsurgeon.quant.loops.tiles import TILE_ROWS
from tensorsurgeon.tensors.arrays import aligned

# Rounds F32 scales to what the format will store, F32 in and out.
StoreScale = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSearch:
    """Candidates are ``steps`` multiples of the base scale, evenly spaced from ``low`` to ``high``, and the base itself.

    From 0.4, as 3 and 2 bits want scales below 0.6 (a tenth and a quarter less error than with 0.6 as the end), and in
    steps of 0.05, as half of that gains nothing.
    """

    low: float = 0.4
    high: float = 1.05
    steps: int = 14

    def ratios(self) -> list[float]:
        """All candidates, the nearest to 1 first: where candidates tie, the base scale is changed least."""
        spacing = (self.high - self.low) / max(1, self.steps - 1)
        spread = [round(self.low + spacing * step, 12) for step in range(self.steps)]
        return sorted({1.0, *spread}, key=lambda ratio: (abs(ratio - 1.0), ratio))


def search_scale(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    group_size: int,
    store_scale: StoreScale,
    importance: Tensor | None = None,
    options: ScaleSearch | None = None,
    spacing: Spacing = EVEN,
) -> Tensor:
    """The stored scale of each group with the least ``sum_j importance_j (w_j - dequantized_j)^2``, F32 [N, G].

    ``weight`` [N, K] F32, ``scale`` [N, G] the base scales (a negative one stays negative), ``zero_point`` [N, G],
    ``importance`` [K] (the Hessian's diagonal, or what GPTQ pays per column) or None for equal weights. Candidates are
    compared as they would be stored; one that does not fit the stored type is not considered. ``spacing``: where levels lie.
    """
    check_grid(weight, scale, zero_point, group_size)
    options = options or ScaleSearch()
    columns = weight.shape[1]
    weights = torch.ones(columns) if importance is None else importance.to(torch.float32)
    if weights.shape != (columns,) or not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise NumericError(f"importance must be {columns} finite numbers, none negative")
    base = scale.to(torch.float32).T.contiguous()
    safe = stored(base, store_scale)
    ratios = torch.tensor(options.ratios(), dtype=torch.float32)
    candidates = store_scale(base * ratios[:, None, None]).to(torch.float32)
    candidates = torch.where(torch.isfinite(candidates), candidates, safe).contiguous()
    best = np.zeros(base.shape, np.int64)
    loops.best_candidate(
        weight.T.contiguous().numpy(),
        weights.contiguous().numpy(),
        candidates.numpy(),
        zero_rows(zero_point, base.shape).numpy(),
        columns if group_size == -1 else group_size,
        np.float32(qmin),
        np.float32(qmax),
        np.float32(spacing.fraction),
        np.float32(spacing.least),
        best,
        aligned((3, TILE_ROWS), np.float32),
    )
    return torch.gather(candidates, 0, torch.from_numpy(best)[None])[0].T.contiguous()


def round_to_nearest(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, *, qmin: int, qmax: int, spacing: Spacing = EVEN
) -> Tensor:
    """clamp(round(w / scale + zero_point)), ties to even; [N, K] in the ``code_dtype`` of the grid."""
    per_column = weight.shape[1] // scale.shape[1]
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).repeat_interleave(per_column, 1)
    level = weight / divisor
    if zero_point is not None:
        level = level + zero_point.to(torch.float32).repeat_interleave(per_column, 1)
    return nearest_levels(level, qmin, qmax, spacing).to(code_dtype(qmin, qmax, spacing))


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """(codes - zero_point) * scale, F32 [N, K]."""
    per_column = codes.shape[1] // scale.shape[1]
    level = codes.to(torch.float32)
    if zero_point is not None:
        level = level - zero_point.to(torch.float32).repeat_interleave(per_column, 1)
    return level * scale.repeat_interleave(per_column, 1)


def stored(scale: Tensor, store_scale: StoreScale) -> Tensor:
    """Scales as the format stores them, F32; raises NumericError where one does not fit the stored type."""
    rounded = store_scale(scale).to(torch.float32).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        raise NumericError(f"scale {float(scale.abs().max()):g} does not fit the stored type")
    return rounded


def zero_rows(zero_point: Tensor | None, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Zero points as contiguous F32 [G, N], zeros for a symmetric grid; ``shape`` is that of the transposed scale."""
    return torch.zeros(shape) if zero_point is None else zero_point.to(torch.float32).T.contiguous()


def check_grid(weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> None:
    """Raise NumericError unless weight, scale and zero point are finite and fit each other."""
    if weight.ndim != 2 or weight.dtype != torch.float32 or weight.device.type != "cpu":
        found = f"{weight.dtype} {tuple(weight.shape)} on {weight.device}"
        raise NumericError(f"weight must be an F32 matrix on the CPU, found {found}")
    rows, columns = weight.shape
    width = columns if group_size == -1 else group_size
    if width < 1 or columns % width:
        raise NumericError(f"group_size {group_size} does not divide {columns} input columns")
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and tensor.shape != (rows, columns // width):
            raise NumericError(f"{name} is {tuple(tensor.shape)}, wanted {(rows, columns // width)}")
    for name, tensor in (("weight", weight), ("scale", scale), ("zero_point", zero_point)):
        # The largest magnitude is NaN or infinite if any entry is: one pass, no mask.
        if tensor is not None and tensor.numel() and not bool(torch.isfinite(tensor.abs().max())):
            raise NumericError(f"{name} has entries that are not finite")

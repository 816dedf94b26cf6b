"""The grid of a weight as those take it that choose codes: levels in units of scales, and back to what a format packs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.calibrate.codes.linears import Linear, ReadOriginal
from tensorsurgeon.calibrate.codes.rules import store_scale_of
from tensorsurgeon.quant.gptq.levels import E2M1, E4M3, EVEN, Spacing
from tensorsurgeon.quant.gptq.scale_search import ScaleSearch, StoreScale
from tensorsurgeon.quant.rtn.plain_torch import tensor_of
from tensorsurgeon.quant.scheme import Quantized, Scheme

# E2M1 is counted in halves: code -> level.
_HALVES: Final = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)
_LARGEST_E4M3: Final = 448.0
# What stands for a scale that rounds to 0, as where scales are not searched.
_LEAST_LOCAL: Final = 0.125
_NVFP4_SEARCH: Final = ScaleSearch(low=0.5, high=1.6, steps=23)
"""Up to 1.6 times the scale that maps the largest magnitude to 6: mapped to 4 instead, a group has finer levels near it."""
_MXFP4_SEARCH: Final = ScaleSearch(low=0.5, high=2.0, steps=4)
"""Half, whole and twice the scale: there are no others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelGrid:
    """What rounding to nearest made of a weight [N, K], in levels, and how levels and scales become what is packed.

    ``codes`` [N, K] in the grid's ``code_dtype``; ``scale`` F32 [N, G], a level's size. ``keep_scales``: they are shared by rows,
    so that no row may have its own. ``packed`` makes stored codes and scales of levels and their scales.
    """

    codes: Tensor
    scale: Tensor
    low: int
    high: int
    group_size: int
    spacing: Spacing
    store_scale: StoreScale
    packed: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    zero_point: Tensor | None = None
    keep_scales: bool = False
    search: ScaleSearch | None = None


def grid_of(base: Quantized, scheme: Scheme) -> LevelGrid:
    """The grid of what rounding to nearest made under a (resolved) scheme."""
    if scheme.type == "fp8":
        return _fp8(base, scheme)
    if scheme.type in ("nvfp4", "mxfp4"):
        return _fp4(base, scheme)
    return LevelGrid(
        codes=torch.from_numpy(base.codes), scale=torch.from_numpy(base.scale), low=scheme.qmin, high=scheme.qmax,
        group_size=scheme.group_size, spacing=EVEN, store_scale=store_scale_of(scheme),
        packed=lambda codes, scale: (codes, scale),
        zero_point=None if base.zero_point is None else torch.from_numpy(base.zero_point),
    )  # fmt: skip


def _fp8(base: Quantized, scheme: Scheme) -> LevelGrid:
    codes = torch.from_numpy(base.codes.astype(np.float32))
    kept = torch.from_numpy(base.scale)
    scale, group_size = kept, scheme.group_size
    if scheme.block is not None:
        height, group_size = scheme.block
        scale = kept.repeat_interleave(height, 0)[: len(codes)].contiguous()

    def packed(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return codes.to(torch.float8_e4m3fn).view(torch.uint8), scale if scheme.block is None else kept

    return LevelGrid(
        codes=codes, scale=scale, low=-448, high=448, group_size=group_size, spacing=E4M3, store_scale=store_scale_of(scheme),
        packed=packed, keep_scales=scheme.block is not None,
    )  # fmt: skip


def _fp4(base: Quantized, scheme: Scheme) -> LevelGrid:
    # A level is half of E2M1's 1, and NVFP4's scales are those on disk over the global one.
    over = 2.0 if base.global_scale is None else 2.0 * float(base.global_scale[0])
    on_disk = _power_of_two if base.global_scale is None else _local
    scale = torch.from_numpy(base.scale)

    def packed(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        sizes = codes.abs().contiguous()
        return torch.bucketize(sizes, _HALVES[:8]).to(torch.uint8) | (codes < 0).to(torch.uint8) << 3, on_disk(scale * over)

    return LevelGrid(
        codes=_HALVES[tensor_of(base.codes).long()], scale=scale / over, low=-12, high=12, group_size=scheme.group_size,
        spacing=E2M1, store_scale=lambda scale: on_disk(scale * over) / over, packed=packed,
        search=_MXFP4_SEARCH if base.global_scale is None else _NVFP4_SEARCH,
    )  # fmt: skip


def _local(scale: Tensor) -> Tensor:
    """The E4M3 scale of an NVFP4 group, F32."""
    rounded = scale.clamp(max=_LARGEST_E4M3).to(torch.float8_e4m3fn).to(torch.float32)
    return torch.where(rounded == 0, torch.full_like(rounded, _LEAST_LOCAL), rounded)


def _power_of_two(scale: Tensor) -> Tensor:
    """The nearest power of two from 2^-127, the least E8M0 and a subnormal float32, to 2^127."""
    bits = scale.contiguous().view(torch.int32)
    exponent = ((bits + (1 << 22)) >> 23).clamp(max=254)
    return torch.where(bits < 3 << 21, 1 << 22, exponent << 23).to(torch.int32).view(torch.float32)


def largest_magnitude(linear: Linear, linears: Sequence[Linear], original: ReadOriginal) -> float | None:
    """The largest magnitude of the weights that share one scale for the whole of them; None where a weight has no such scale."""
    if linear.scheme.type != "nvfp4":
        return None
    weights = (original(other) for other in linears if other.weight.name in linear.together)
    return max(float(np.abs(weight.astype(np.float32)).max(initial=0.0)) for weight in weights)

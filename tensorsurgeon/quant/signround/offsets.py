"""Rounding offsets and range factors of one matrix, from codes that are there (SignRound, Cheng et al., arXiv 2309.05516).

A code is ``clamp(round(w / s + v) + z)`` with an offset ``v`` per weight; the scale is ``s = s0 (a A + b B)``, the factors ``a``
and ``b`` of a group's upper and lower end being 1 at first and ``A + B = 1`` how the range lies about zero. Symmetric grids have
``a`` alone, as both ends move together. Offsets begin at the least shift that rounds to the code that is there, so codes of any
origin are a start. Rounding has no gradient: it is passed straight through, as if it were the identity, but where a code is
clamped. What comes in is the slope of the error by the dequantized weight; all that is done with it is to take signs.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from tensorsurgeon.quant.gptq.levels import code_dtype
from tensorsurgeon.quant.gptq.scale_search import StoreScale
from tensorsurgeon.quant.signround.options import MOST_OFFSET, SignRound

# How far inside the interval of its code an offset begins that had to be shifted there, in codes.
MARGIN: Final = 0.01
# A factor of a range never goes below this.
_LEAST_FACTOR: Final = 0.05


class Codes(NamedTuple):
    """``codes`` [N, K] int8, ``scale`` [N, G] F32 as stored, ``zero_point`` [N, G] int8 or None."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


class Offsets:
    """The state of one matrix while it is tuned: ``weight`` [N, K] of any float dtype, and F32 offsets beside it.

    All tensors are on one device, where everything is computed in F32.
    """

    def __init__(self, weight: Tensor, start: Codes, *, num_bits: int, store_scale: StoreScale, options: SignRound) -> None:
        self._weight = weight
        self._bits = num_bits
        self._qmin, self._qmax = -(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1
        self._base = start.scale.to(torch.float32)
        self._zero = None if start.zero_point is None else start.zero_point.to(torch.float32)
        self._store_scale = store_scale
        self._options = options
        self._upper = torch.ones_like(self._base)
        self._lower = None if self._zero is None else torch.ones_like(self._base)
        self._offset = self._least_shift(start.codes.to(torch.float32))

    @property
    def _steps(self) -> int:
        return self._qmax - self._qmin

    def _wide(self, by_group: Tensor) -> Tensor:
        return by_group.repeat_interleave(self._weight.shape[1] // by_group.shape[1], 1)

    def _by_group(self, by_column: Tensor) -> Tensor:
        return by_column.view(len(by_column), self._base.shape[1], -1).sum(2)

    def _least_shift(self, codes: Tensor) -> Tensor:
        position = self._weight.float() / self._wide(_divisor(self._base))
        zero = 0.0 if self._zero is None else self._wide(self._zero)
        is_there = (position.round() + zero).clamp_(self._qmin, self._qmax) == codes
        distance = (codes - zero) - position
        return torch.where(is_there, torch.zeros_like(distance), distance - distance.sign() * (MOST_OFFSET - MARGIN))

    def _shares(self) -> tuple[Tensor, Tensor]:
        """``a A`` and ``b B`` [N, G] of a grid with zero points."""
        assert self._zero is not None
        assert self._lower is not None
        return self._upper * (self._qmax - self._zero) / self._steps, self._lower * (self._zero - self._qmin) / self._steps

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale as stored and zero point [N, G], as they are now."""
        zero = None
        factor = self._upper
        if self._zero is not None:
            above, below = self._shares()
            factor = above + below
            zero = (self._qmin + (self._steps * below / factor).round_()).clamp_(self._qmin, self._qmax)
        scale = self._store_scale(self._base * factor).to(torch.float32)
        is_sound = torch.isfinite(scale) & (scale * self._base.sign() > 0)
        return torch.where(is_sound, scale, self._base), zero

    def _positions(self, scale: Tensor) -> Tensor:
        """``w / s + v``, before rounding."""
        return (self._weight.float() / self._wide(_divisor(scale))).add_(self._offset)

    def made(self) -> Codes:
        """Codes and grid as they are now."""
        scale, zero = self._grid()
        level = self._positions(scale).round_()
        if zero is not None:
            level += self._wide(zero)
        codes = level.clamp_(self._qmin, self._qmax).to(code_dtype(self._qmin, self._qmax))
        return Codes(codes, scale, None if zero is None else zero.to(torch.int8))

    def step(self, slope: Tensor, step: int) -> None:
        """Go a step against the sign of the gradient, given the error's ``slope`` by the dequantized weight [N, K]."""
        rate, range_rate = self._options.rates(self._bits, step)
        scale, zero = self._grid()
        slope = slope.float()
        level = self._positions(scale)
        by_scale = self._offset - level  # -w / s
        level = level.round_() if zero is None else level.round_().add_(self._wide(zero))
        inside = (level >= self._qmin) & (level <= self._qmax)
        level.clamp_(self._qmin, self._qmax)
        by_scale = torch.where(inside, by_scale, torch.zeros_like(by_scale)).add_(level)
        if zero is not None:
            by_scale -= self._wide(zero)
        pull = self._by_group(by_scale.mul_(slope)) * self._base
        # The scale's sign is that of its group; its size does not matter to the sign of the gradient.
        self._offset.sub_(torch.where(inside, slope, torch.zeros_like(slope)).mul_(self._wide(scale.sign())).sign_(), alpha=rate)
        if self._options.start == "rtn":
            self._offset.clamp_(-MOST_OFFSET, MOST_OFFSET)
        if self._zero is None or self._lower is None:
            self._move(self._upper, pull, range_rate)
            return
        above, below = self._shares()
        by_zero = -self._by_group(torch.where(inside, torch.zeros_like(slope), slope)) * scale
        turn = by_zero * self._steps * above * below / (above + below).square()
        lift, drop = (self._qmax - self._zero) / self._steps, (self._zero - self._qmin) / self._steps
        self._move(self._upper, pull * lift - turn / self._upper, range_rate)
        self._move(self._lower, pull * drop + turn / self._lower, range_rate)

    def _move(self, factor: Tensor, gradient: Tensor, rate: float) -> None:
        factor.sub_(gradient.sign(), alpha=rate).clamp_(_LEAST_FACTOR, self._options.widest)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)

"""How SignRound is run, and recipes by name; all of it is part of the result's bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

from tensorsurgeon.errors import RecipeError, did_you_mean

# From here on AutoRound doubles the rate of grids of 3 bits and less.
_MANY_STEPS: Final = 1000
_FEW_BITS: Final = 3
# Offsets stay within half a code of where they began.
MOST_OFFSET: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SignRound:
    """``steps`` sign-gradient steps on rounding offsets and on factors of each group's range, of ``batch`` sequences each.

    ``rate``: how far an offset goes in the first step, in codes; it falls to 0 along a line. None: 1 / steps as AutoRound has
    it, and twice that from 1,000 steps on at 3 bits and less. ``range_rate`` is that of the factors, None: as ``rate``.
    ``start``: from GPTQ's ``polished`` codes, or from ``rtn``. ``widest``: the largest factor of a range; AutoRound has 1.
    ``checks``: how often the error over all calibration text is taken on the way; the best of these and of the start is kept.
    """

    steps: int = 40
    batch: int = 8
    rate: float | None = 0.005
    range_rate: float | None = 0.001
    start: Literal["polished", "rtn"] = "polished"
    widest: float = 1.5
    checks: int = 2

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.checks) < 1:
            raise RecipeError(f"SignRound needs a step, a sequence and a check; found {self.steps}, {self.batch}, {self.checks}")
        for name in ("rate", "range_rate"):
            given = getattr(self, name)
            if given is not None and not 0.0 <= given < math.inf:
                raise RecipeError(f"SignRound's {name} must be finite and not negative, found {given}")

    def rates(self, num_bits: int, step: int) -> tuple[float, float]:
        """How far offsets and factors go in step ``step``, counted from 0."""
        rate = self.rate
        if rate is None:
            rate = (2.0 if self.steps >= _MANY_STEPS and num_bits <= _FEW_BITS else 1.0) / self.steps
        left = 1.0 - step / self.steps
        return rate * left, (rate if self.range_rate is None else self.range_rate) * left

    def is_check(self, step: int) -> bool:
        """Whether the error is taken behind step ``step``: at even distances, and behind the last."""
        return (step + 1) * self.checks // self.steps > step * self.checks // self.steps


_AUTOROUND: Final = SignRound(steps=200, rate=None, range_rate=None, start="rtn", widest=1.0, checks=10)

# AutoRound 0.16's own (auto_round/cli/main.py): what its command line calls default, best and light.
RECIPES: Final[dict[str, SignRound]] = {
    "default": SignRound(),
    "autoround": _AUTOROUND,
    "autoround-best": SignRound(steps=1000, rate=None, range_rate=None, start="rtn", widest=1.0, checks=20),
    "autoround-light": SignRound(steps=50, rate=0.005, range_rate=None, start="rtn", widest=1.0, checks=5),
}


def recipe_named(text: str) -> SignRound:
    """The recipe ``NAME``, or ``NAME:STEPS`` with another number of steps; RecipeError for anything else."""
    name, colon, steps = text.partition(":")
    if name not in RECIPES:
        raise RecipeError(f"signround {text}: unknown recipe {name!r}{did_you_mean(name, list(RECIPES))}")
    if not colon:
        return RECIPES[name]
    if not steps.isdecimal() or not int(steps):
        raise RecipeError(f"signround {text}: steps must be a positive number, found {steps!r}")
    return replace(RECIPES[name], steps=int(steps))

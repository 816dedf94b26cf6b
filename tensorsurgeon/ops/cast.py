"""Change the element type of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tensorsurgeon.arrays import empty
from tensorsurgeon.dtypes import DTYPES, DType
from tensorsurgeon.errors import NumericError, RecipeError, SpecError, did_you_mean
from tensorsurgeon.names import Selector
from tensorsurgeon.spec import Region, SpecMap
from tensorsurgeon.transform import Array, Rewrite


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Convert the tensors that ``where`` selects to ``dtype``, rounding to nearest even.

    A finite value that the new type cannot hold stops the run, as does a conversion from or to a type without
    arithmetic. One-way: the bits that rounding took cannot come back.
    """

    where: tuple[str, ...]
    dtype: str
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"cast: unknown dtype {self.dtype!r}{did_you_mean(self.dtype, list(DTYPES))}")
        if DTYPES[self.dtype].numpy is None:
            raise RecipeError(f"cast: {self.dtype} is narrower than a byte and cannot be converted to")

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        target: DType = DTYPES[self.dtype]
        rewrites = []
        for name in Selector(self.where, self.exclude).select(specs):
            spec = specs[name]
            if spec.dtype is target:
                continue
            if spec.dtype.numpy is None:
                raise SpecError(f"{name}: {spec.dtype.name} is narrower than a byte and cannot be converted")
            rewrites.append(Rewrite((Region(spec),), (Region(spec._replace(dtype=target)),)))
        return tuple(rewrites)

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        (array,) = inputs
        name = rewrite.inputs[0].spec.name
        target = DTYPES[self.dtype]
        assert target.numpy is not None
        result = empty(array.shape, target.numpy)
        with np.errstate(over="ignore", invalid="ignore"):
            result[...] = array.astype(target.numpy)
        if target.is_float:
            finite_before, finite_after = np.isfinite(array.astype(np.float64)), np.isfinite(result.astype(np.float64))
            lost = int(np.count_nonzero(finite_before & ~finite_after))
            if lost:
                raise NumericError(f"{name}: {lost} finite values do not fit {self.dtype}; choose a wider dtype")
        elif not np.array_equal(result.astype(np.float64), array.astype(np.float64)):
            raise NumericError(f"{name}: values would change when converted to {self.dtype}")
        return (result,)

"""Change the element type of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from tensorsurgeon.errors import NumericError, RecipeError, SpecError, did_you_mean
from tensorsurgeon.models.selecting import selected
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.tensors.arrays import empty
from tensorsurgeon.tensors.dtypes import C64, DTYPES, F8_E8M0, F32, F64, DType
from tensorsurgeon.tensors.spec import Region, SpecMap

# A large tensor goes piece by piece; fixed, so that no machine changes a unit.
_CHUNK_BYTES = 16 << 20
# Checking a conversion takes temporaries of eight bytes an element: they stay small.
_BLOCK_ELEMENTS = 1 << 16
_BLOCK_BYTES_PER_ELEMENT = 48


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class Cast:
    """Convert the tensors that ``where`` selects to ``dtype``, rounding once, to nearest even.

    A finite value that the new type cannot hold stops the run; integer types take only values that are theirs
    exactly. One-way: the bits that rounding took cannot come back.
    """

    where: tuple[str, ...]
    dtype: str
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"cast: unknown dtype {self.dtype!r}{did_you_mean(self.dtype, list(DTYPES))}")
        if DTYPES[self.dtype].numpy is None:
            raise RecipeError(f"cast: {self.dtype} is narrower than a byte and cannot be converted to")
        if DTYPES[self.dtype] in (C64, F8_E8M0):
            raise RecipeError(f"cast: {self.dtype} holds no plain numbers (complex, or powers of two alone)")

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        target: DType = DTYPES[self.dtype]
        rewrites = []
        for name in list(selected(specs, self.where, self.exclude)):
            spec = specs[name]
            if spec.dtype is target:
                continue
            if spec.dtype.numpy is None or spec.dtype is C64:
                raise SpecError(f"{name}: {spec.dtype.name} holds no plain numbers and cannot be converted")
            made = spec._replace(dtype=target)
            if spec.nbytes <= _CHUNK_BYTES or not spec.shape:
                rewrites.append(Rewrite((Region(spec),), (Region(made),)))
                continue
            step = max(1, _CHUNK_BYTES // spec.row_bytes)
            for start in range(0, spec.rows, step):
                stop = min(start + step, spec.rows)
                rewrites.append(Rewrite((Region(spec, start, stop),), (Region(made, start, stop),)))
        return tuple(rewrites)

    def scratch_bytes(self, rewrite: Rewrite) -> int:
        """A block in F64, rounded and back, and what tells exact values from others."""
        return _BLOCK_BYTES_PER_ELEMENT * min(prod(rewrite.outputs[0].shape), _BLOCK_ELEMENTS)

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        (array,) = inputs
        target = DTYPES[self.dtype]
        assert target.numpy is not None
        result = empty(array.shape, target.numpy)
        source, made = array.reshape(-1), result.reshape(-1)
        lost = 0
        for start in range(0, source.size, _BLOCK_ELEMENTS):
            block = source[start : start + _BLOCK_ELEMENTS]
            made[start : start + _BLOCK_ELEMENTS], count = _convert(block, rewrite.inputs[0].spec.dtype, target)
            lost += count
        if lost:
            kind = "finite values do not fit" if target.is_float else "values are no values of"
            raise NumericError(f"{rewrite.inputs[0].spec.name}: {lost} {kind} {self.dtype}; choose another dtype")
        return (result,)


def _convert(block: Array, dtype: DType, target: DType) -> tuple[Array, int]:
    """The block in the new type, and how many of its values the new type cannot stand for."""
    wide = block.astype(np.float64)
    if not target.is_float:
        return _to_integers(block, wide, dtype, target)
    # An integer of 64 bits that float64 cannot hold would be rounded twice.
    lost = 0 if dtype.is_float else int(np.count_nonzero(wide.astype(object) != block.astype(object))) if dtype.bits == 64 else 0
    with np.errstate(over="ignore", invalid="ignore"):
        if target is F64 or target is F32 or dtype.bits < 32 or dtype is F32:
            made = block.astype(target.numpy)
        else:
            made = _to_odd(wide).astype(target.numpy)
        lost += int(np.count_nonzero(np.isfinite(wide) & ~np.isfinite(made.astype(np.float64))))
    return made, lost


def _to_odd(wide: Array) -> Array:
    """float64 to float32 such that rounding the result again is rounding once: what is inexact gets an odd last bit."""
    single = wide.astype(np.float32)
    inexact = (single.astype(np.float64) != wide) & ~np.isnan(wide)
    bits = single.view(np.uint32)
    outward = np.abs(single.astype(np.float64)) > np.abs(wide)
    odd = (bits - outward.astype(np.uint32)) | np.uint32(1)
    return np.where(inexact, odd, bits).view(np.float32)


def _to_integers(block: Array, wide: Array, dtype: DType, target: DType) -> tuple[Array, int]:
    if target.name == "BOOL":
        fits = (block == 0) | (block == 1)
    elif dtype.is_float:
        limits = np.iinfo(target.numpy)
        fits = (wide >= limits.min) & (wide < limits.max + 1.0) & (wide == np.trunc(wide))
    else:
        made = block.astype(target.numpy)
        fits = (made.astype(block.dtype) == block) & ((made < 0) == (block < 0))
    safe = np.where(fits, block, np.zeros((), block.dtype))
    return safe.astype(target.numpy), int(np.count_nonzero(~fits))

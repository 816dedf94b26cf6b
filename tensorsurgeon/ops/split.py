"""Cut tensors into named parts along an axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from tensorsurgeon.errors import RecipeError, SpecError
from tensorsurgeon.models.selecting import selected
from tensorsurgeon.ops.columns import split_columns
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.ops.grouping import check_pieces
from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.tensors.names import fill
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class Split:
    """Cut each tensor that ``where`` selects into the parts named by ``into``, along ``axis``.

    ``sizes`` gives the size of each part along the axis; without it the parts are equal. ``experts.gate_up_proj``
    [E, 2I, H] into gate and up is a split along axis 1. Along every axis but the last this moves bytes only.
    """

    reversible: ClassVar[bool] = True

    where: tuple[str, ...]
    into: tuple[str, ...]
    axis: int = 0
    sizes: tuple[int, ...] | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.into) < 2:
            raise RecipeError("split: into needs at least two names")
        if self.sizes is not None and len(self.sizes) != len(self.into):
            raise RecipeError(f"split: {len(self.sizes)} sizes for {len(self.into)} names")
        if self.sizes is not None and min(self.sizes) < 0:
            raise RecipeError(f"split: sizes must not be negative, found {list(self.sizes)}")

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        rewrites: list[Rewrite] = []
        for name, fields in selected(specs, self.where, self.exclude).items():
            spec = specs[name]
            rank = len(spec.shape)
            axis = self.axis + rank if self.axis < 0 else self.axis
            if not 0 <= axis < rank:
                raise SpecError(f"{name}: shape {list(spec.shape)} has no axis {self.axis}")
            sizes = part_sizes(spec, axis, len(self.into), self.sizes)
            parts = [
                TensorSpec(fill(to, fields), spec.dtype, (*spec.shape[:axis], size, *spec.shape[axis + 1 :]))
                for to, size in zip(self.into, sizes, strict=True)
            ]
            if not spec.numel:
                # Without rows there is nothing to cut, and no rewrite per row to name the parts.
                rewrites.append(Rewrite((Region(spec),), tuple(map(Region, parts)), True))
            elif axis == rank - 1 and rank > 1:
                rewrites.append(Rewrite((Region(spec),), tuple(map(Region, parts))))
            else:
                rewrites.extend(_row_moves(spec, parts, axis))
        return tuple(rewrites)

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        return split_columns(rewrite, inputs)


def part_sizes(spec: TensorSpec, axis: int, count: int, sizes: tuple[int, ...] | None) -> tuple[int, ...]:
    """Sizes of the parts along an axis; SpecError if they do not add up."""
    size = spec.shape[axis]
    if sizes is None:
        if size % count:
            raise SpecError(
                f"{spec.name}: axis {axis} of {list(spec.shape)} does not divide into {count} equal parts; give sizes"
            )
        return (size // count,) * count
    if sum(sizes) != size:
        raise SpecError(
            f"{spec.name}: sizes {list(sizes)} add up to {sum(sizes)}, but axis {axis} of {list(spec.shape)} has {size}"
        )
    return sizes


def _row_moves(spec: TensorSpec, parts: Sequence[TensorSpec], axis: int) -> Iterator[Rewrite]:
    """One byte move per outer index and part: rows of the whole become rows of the part."""
    inner = prod(spec.shape[axis + 1 : -1]) if axis < len(spec.shape) - 1 else 1
    outer = prod(spec.shape[:axis])
    check_pieces(spec, outer * len(parts))
    rows = spec.shape[axis] * inner
    start = 0
    for part in parts:
        size = part.shape[axis] * inner
        for index in range(outer):
            source = Region(spec, index * rows + start, index * rows + start + size)
            target = Region(part) if outer == 1 else Region(part, index * size, (index + 1) * size)
            yield Rewrite((source,), (target,), True)
        start += size

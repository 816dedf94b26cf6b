"""Join tensors along an axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from tensorsurgeon.errors import RecipeError, SpecError
from tensorsurgeon.ops.columns import join_columns
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.ops.grouping import check_alike, check_pieces, parts_by_fields
from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.tensors.names import fill
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class Concat:
    """Join the tensors named by ``parts`` (one pattern each, with the same fields) into ``into``, along ``axis``.

    The inverse of ``split``. Along every axis but the last this moves bytes only.
    """

    reversible: ClassVar[bool] = True

    parts: tuple[str, ...]
    into: str
    axis: int = 0

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise RecipeError("concat: parts needs at least two patterns")

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        rewrites: list[Rewrite] = []
        for fields, parts in parts_by_fields(specs, self.parts).items():
            rank = len(parts[0].shape)
            axis = self.axis + rank if self.axis < 0 else self.axis
            if not 0 <= axis < rank:
                raise SpecError(f"{parts[0].name}: shape {list(parts[0].shape)} has no axis {self.axis}")
            check_alike(parts, but_axis=axis)
            shape = parts[0].shape
            size = sum(part.shape[axis] for part in parts)
            whole = TensorSpec(fill(self.into, dict(fields)), parts[0].dtype, (*shape[:axis], size, *shape[axis + 1 :]))
            if not whole.numel:
                rewrites.append(Rewrite(tuple(map(Region, parts)), (Region(whole),), True))
            elif axis == rank - 1 and rank > 1:
                rewrites.append(Rewrite(tuple(map(Region, parts)), (Region(whole),)))
            else:
                rewrites.extend(_row_moves(parts, whole, axis))
        return tuple(rewrites)

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        return join_columns(rewrite, inputs)


def _row_moves(parts: Sequence[TensorSpec], whole: TensorSpec, axis: int) -> Iterator[Rewrite]:
    """One byte move per outer index and part, in the order of the whole."""
    inner = prod(whole.shape[axis + 1 : -1]) if axis < len(whole.shape) - 1 else 1
    outer = prod(whole.shape[:axis])
    check_pieces(whole, outer * len(parts))
    rows = whole.shape[axis] * inner
    start = 0
    for part in parts:
        size = part.shape[axis] * inner
        for index in range(outer):
            source = Region(part) if outer == 1 else Region(part, index * size, (index + 1) * size)
            yield Rewrite((source,), (Region(whole, index * rows + start, index * rows + start + size),), True)
        start += size

"""Join numbered tensors into one with a new first axis."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tensorsurgeon.errors import RecipeError, SpecError
from tensorsurgeon.ops.byte_move import ByteMove
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.ops.grouping import check_alike, stacks_by_fields
from tensorsurgeon.planning.rewriting import Rewrite
from tensorsurgeon.tensors.names import fill
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class Stack(ByteMove):
    """Join the tensors that ``where`` selects, numbered from 0 by its field ``{index}``, into ``into``.

    The inverse of ``unstack``: 256 experts [H, I] become [256, H, I].
    """

    where: tuple[str, ...]
    into: str

    def __post_init__(self) -> None:
        if not all("{index}" in pattern or "(?P<index>" in pattern for pattern in self.where):
            raise RecipeError("stack: every pattern of where needs a field {index} for the number")

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        rewrites: list[Rewrite] = []
        for fields, parts in stacks_by_fields(specs, self.where).items():
            check_alike(parts)
            shape = parts[0].shape
            if not shape:
                raise SpecError(f"{parts[0].name}: scalars cannot be stacked; reshape them to [1] first")
            whole = TensorSpec(fill(self.into, dict(fields)), parts[0].dtype, (len(parts), *shape))
            rows = prod(shape[:-1])
            rewrites.extend(
                Rewrite((Region(part),), (Region(whole, i * rows, (i + 1) * rows),), True) for i, part in enumerate(parts)
            )
        return tuple(rewrites)

"""Insert axes of size one; the bytes stay."""

from __future__ import annotations

from dataclasses import dataclass

from tensorsurgeon.errors import SpecError
from tensorsurgeon.models.selecting import selected
from tensorsurgeon.ops.byte_move import ByteMove
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.planning.rewriting import Rewrite
from tensorsurgeon.tensors.spec import Region, SpecMap


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class Unsqueeze(ByteMove):
    """Insert an axis of size one at ``axis`` into the tensors that ``where`` selects (scales [N] become [N, 1])."""

    where: tuple[str, ...]
    axis: int = -1
    exclude: tuple[str, ...] = ()

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        rewrites = []
        for name in selected(specs, self.where, self.exclude):
            spec = specs[name]
            rank = len(spec.shape)
            axis = self.axis + rank + 1 if self.axis < 0 else self.axis
            if not 0 <= axis <= rank:
                raise SpecError(f"{name}: shape {list(spec.shape)} has no place {self.axis} for a new axis")
            target = spec._replace(shape=(*spec.shape[:axis], 1, *spec.shape[axis:]))
            rewrites.append(Rewrite((Region(spec),), (Region(target),), True))
        return tuple(rewrites)

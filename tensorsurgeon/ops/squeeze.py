"""Remove axes of size one; the bytes stay."""

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
class Squeeze(ByteMove):
    """Remove axis ``axis`` of size one from the tensors that ``where`` selects (scales [N, 1] become [N]).

    ``if_unit`` leaves tensors alone that do not have such an axis, instead of refusing them.
    """

    where: tuple[str, ...]
    axis: int = -1
    exclude: tuple[str, ...] = ()
    if_unit: bool = False

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        rewrites = []
        for name in selected(specs, self.where, self.exclude):
            spec = specs[name]
            rank = len(spec.shape)
            axis = self.axis + rank if self.axis < 0 else self.axis
            if not 0 <= axis < rank or spec.shape[axis] != 1 or (self.if_unit and rank < 2):
                if self.if_unit:
                    continue
                raise SpecError(f"{name}: shape {list(spec.shape)} has no axis {self.axis} of size 1 to squeeze")
            target = spec._replace(shape=spec.shape[:axis] + spec.shape[axis + 1 :])
            rewrites.append(Rewrite((Region(spec),), (Region(target),), True))
        return tuple(rewrites)

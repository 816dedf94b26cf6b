"""Keep some tensors and leave out all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tensorsurgeon.models.selecting import selected
from tensorsurgeon.ops.byte_move import ByteMove
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.planning.rewriting import Rewrite
from tensorsurgeon.tensors.spec import Region, SpecMap


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class Keep(ByteMove):
    """Keep the tensors that ``where`` selects and drop every other one."""

    reversible: ClassVar[bool] = False

    where: tuple[str, ...]
    exclude: tuple[str, ...] = ()

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        kept = selected(specs, self.where, self.exclude)
        return tuple(Rewrite((Region(spec),), (), True) for name, spec in specs.items() if name not in kept)

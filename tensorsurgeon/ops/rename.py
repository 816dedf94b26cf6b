"""Give tensors other names; their bytes stay."""

from __future__ import annotations

from dataclasses import dataclass

from tensorsurgeon.models.selecting import selected
from tensorsurgeon.ops.byte_move import ByteMove
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.planning.rewriting import Rewrite
from tensorsurgeon.tensors.names import fill
from tensorsurgeon.tensors.spec import Region, SpecMap


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class Rename(ByteMove):
    """Rename every tensor that ``where`` selects to ``to``, a template over the fields of the pattern."""

    where: tuple[str, ...]
    to: str
    exclude: tuple[str, ...] = ()

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        rewrites = []
        for name, fields in selected(specs, self.where, self.exclude).items():
            spec = specs[name]
            target = spec._replace(name=fill(self.to, fields))
            if target.name != name:
                rewrites.append(Rewrite((Region(spec),), (Region(target),), True))
        return tuple(rewrites)

"""Change the shape of tensors; their bytes stay."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tensorsurgeon.errors import SpecError
from tensorsurgeon.models.selecting import selected
from tensorsurgeon.ops.byte_move import ByteMove
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.planning.rewriting import Rewrite
from tensorsurgeon.tensors.spec import Region, SpecMap


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class Reshape(ByteMove):
    """Give the tensors that ``where`` selects another ``shape``; one size may be -1."""

    where: tuple[str, ...]
    shape: tuple[int, ...]
    exclude: tuple[str, ...] = ()

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        rewrites = []
        for name in selected(specs, self.where, self.exclude):
            spec = specs[name]
            target = spec._replace(shape=_resolved(name, spec.shape, self.shape))
            rewrites.append(Rewrite((Region(spec),), (Region(target),), True))
        return tuple(rewrites)


def _resolved(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    numel = prod(old)
    known = prod(n for n in new if n != -1)
    free = new.count(-1)
    if free > 1 or any(n < -1 for n in new) or (free and (known == 0 or numel % known)) or (not free and known != numel):
        raise SpecError(f"{name}: shape {list(old)} has {numel} elements and cannot become {list(new)}")
    return tuple(numel // known if n == -1 else n for n in new)

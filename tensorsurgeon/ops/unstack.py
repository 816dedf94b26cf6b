"""Turn one stacked tensor into numbered ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from tensorsurgeon.errors import SpecError
from tensorsurgeon.names import Selector, fill
from tensorsurgeon.spec import Region, SpecMap, TensorSpec
from tensorsurgeon.transform import Array, Moves, Rewrite, move_arrays, turned_around


@dataclass(frozen=True, slots=True, kw_only=True)
class Unstack:
    """Turn each tensor that ``where`` selects into one per index of its first axis.

    ``into`` names them with ``{index}`` for the number: ``experts.down_proj`` [E, H, I] becomes
    ``experts.{index}.down_proj.weight`` [H, I].
    """

    where: tuple[str, ...]
    into: str
    exclude: tuple[str, ...] = ()

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        rewrites = []
        for name, fields in Selector(self.where, self.exclude).select(specs).items():
            spec = specs[name]
            if len(spec.shape) < 2:
                raise SpecError(f"{name}: shape {list(spec.shape)} has no first axis to unstack; two axes are needed")
            if not spec.shape[0]:
                raise SpecError(f"{name}: shape {list(spec.shape)} has an empty first axis; drop this tensor instead")
            shape = spec.shape[1:]
            rows = prod(spec.shape[1:-1])
            for index in range(spec.shape[0]):
                fields["index"] = str(index)
                target = TensorSpec(fill(self.into, fields), spec.dtype, shape)
                source = Region(spec, index * rows, (index + 1) * rows)
                rewrites.append(Rewrite((source,), (Region(target),), True))
        return tuple(rewrites)

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        return move_arrays(rewrite, inputs)

    def inverse(self, rewrites: tuple[Rewrite, ...]) -> Moves:
        return turned_around(rewrites)

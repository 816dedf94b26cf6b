"""Turn one stacked tensor into numbered ones."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tensorsurgeon.errors import RecipeError, SpecError
from tensorsurgeon.models.selecting import selected
from tensorsurgeon.ops.byte_move import ByteMove
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.ops.grouping import check_pieces
from tensorsurgeon.planning.rewriting import Rewrite
from tensorsurgeon.tensors.names import fill
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class Unstack(ByteMove):
    """Turn each tensor that ``where`` selects into one per index of its first axis.

    ``into`` names them with ``{index}`` for the number: ``experts.down_proj`` [E, H, I] becomes
    ``experts.{index}.down_proj.weight`` [H, I]. Several names cut each slice into as many equal parts along its own
    first axis: ``experts.gate_up_proj`` [E, 2I, H] becomes a gate and an up [I, H] per expert.
    """

    where: tuple[str, ...]
    into: tuple[str, ...]
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.into or type(self.into) is not tuple:
            # A string is a sequence too, of names of one letter.
            raise RecipeError(f"unstack: into needs a tuple of at least one name, found {self.into!r}")

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        rewrites = []
        for name, fields in selected(specs, self.where, self.exclude).items():
            spec = specs[name]
            if len(spec.shape) < 2:
                raise SpecError(f"{name}: shape {list(spec.shape)} has no first axis to unstack; two axes are needed")
            if not spec.shape[0]:
                raise SpecError(f"{name}: shape {list(spec.shape)} has an empty first axis; drop this tensor instead")
            check_pieces(spec, spec.shape[0] * len(self.into))
            shape = self._part_shape(spec)
            rows = prod(spec.shape[1:-1]) // len(self.into)
            start = 0
            for index in range(spec.shape[0]):
                fields["index"] = str(index)
                for into in self.into:
                    target = TensorSpec(fill(into, fields), spec.dtype, shape)
                    stop = start + rows
                    rewrites.append(Rewrite((Region(spec, start, stop),), (Region(target),), True))
                    start = stop
        return tuple(rewrites)

    def _part_shape(self, spec: TensorSpec) -> tuple[int, ...]:
        parts = len(self.into)
        if parts == 1:
            return spec.shape[1:]
        if len(spec.shape) < 3 or spec.shape[1] % parts:
            raise SpecError(f"{spec.name}: slices of {list(spec.shape)} cannot be cut into {parts} equal parts of rows")
        return (spec.shape[1] // parts, *spec.shape[2:])

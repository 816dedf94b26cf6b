"""Permute the axes of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tensorsurgeon.errors import SpecError
from tensorsurgeon.models.selecting import selected
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.tensors.arrays import empty
from tensorsurgeon.tensors.spec import Region, SpecMap


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class Transpose:
    """Permute the axes of the tensors that ``where`` selects; without ``axes`` the last two change places."""

    reversible: ClassVar[bool] = True

    where: tuple[str, ...]
    axes: tuple[int, ...] | None = None
    exclude: tuple[str, ...] = ()

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        rewrites = []
        for name in selected(specs, self.where, self.exclude):
            spec = specs[name]
            axes = self._axes(name, len(spec.shape))
            if spec.dtype.numpy is None:
                raise SpecError(f"{name}: {spec.dtype.name} is narrower than a byte and cannot be transposed")
            target = spec._replace(shape=tuple(spec.shape[a] for a in axes))
            rewrites.append(Rewrite((Region(spec),), (Region(target),), detail=axes))
        return tuple(rewrites)

    def _axes(self, name: str, rank: int) -> tuple[int, ...]:
        if self.axes is None:
            if rank < 2:
                raise SpecError(f"{name}: a tensor of {rank} axes cannot be transposed")
            return (*range(rank - 2), rank - 1, rank - 2)
        if sorted(self.axes) != list(range(rank)):
            raise SpecError(f"{name}: axes {list(self.axes)} are no permutation of the {rank} axes")
        return self.axes

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        (array,) = inputs
        result = empty(rewrite.outputs[0].shape, array.dtype)
        np.copyto(result, array.transpose(self._axes(rewrite.inputs[0].spec.name, array.ndim)))
        return (result,)

"""Leave tensors out, and say under which condition that is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tensorsurgeon.errors import NumericError
from tensorsurgeon.models.selecting import selected
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.tensors.spec import Region, SpecMap


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class Drop:
    """Leave out every tensor that ``where`` selects.

    ``only_if: zero`` reads each one and stops the run if any element is not zero: the zero points of symmetric
    quantization carry nothing, and dropping others would ship garbage.
    """

    where: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    only_if: Literal["always", "zero"] = "always"

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        names = selected(specs, self.where, self.exclude)
        return tuple(Rewrite((Region(specs[name]),), (), self.only_if == "always") for name in names)

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        (array,) = inputs
        count = int(np.count_nonzero(array))
        if self.only_if == "zero" and count:
            raise NumericError(
                f"{rewrite.inputs[0].spec.name}: expected zeros only, found {count} other values; "
                "this tensor carries information and cannot be dropped"
            )
        return ()

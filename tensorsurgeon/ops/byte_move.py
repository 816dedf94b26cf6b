"""What the ops share whose every rewrite moves bytes: they plan, and nothing is left to apply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tensorsurgeon.errors import PlanViolationError
from tensorsurgeon.planning.rewriting import Array, Rewrite


class ByteMove:
    """Base of ops that give tensors other names or shapes: ``plan`` alone says what becomes of which bytes.

    Such rewrites are resolved when planning, into ranges of the source, so that no array is ever made of them.
    """

    __slots__ = ()
    reversible: ClassVar[bool] = True

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        """Never reached: PlanViolationError if it is."""
        raise PlanViolationError(f"{rewrite.inputs[0]}: {type(self).__name__.lower()} moves bytes, and was asked to compute")

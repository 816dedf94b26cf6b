"""Stack the experts of a layer as the model's class wants them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tensorsurgeon.errors import NoMatchError, PlanViolationError
from tensorsurgeon.models.gathering import Gathered, stacks_to_gather
from tensorsurgeon.models.stacks import ExpertCut
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.tensors.spec import Region, SpecMap


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class StackExperts:
    """The inverse of ``split_experts``: one tensor for the experts of a layer, in the form of the model's family.

    Only where the class gathers no experts stored one by one; ``always`` makes the usual stacks of other models too, and a
    model without experts is a NoMatchError then. What lies in one piece moves as bytes; a transposed or interleaved expert is a
    piece of work of its own.
    """

    reversible: ClassVar[bool] = True

    always: bool = False

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        stacks = stacks_to_gather(specs, self.always)
        if self.always and not stacks:
            raise NoMatchError("no experts stored one by one as gate_proj, up_proj and down_proj: there is nothing to stack")
        return tuple(rewrite for gathered in stacks for rewrite in _rewrites(gathered))

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        cut = rewrite.detail
        if not isinstance(cut, ExpertCut):
            raise PlanViolationError(f"{rewrite.inputs[0]}: stack_experts moves bytes, and was asked to compute")
        rows = np.stack(inputs, 1).reshape(-1, *inputs[0].shape[1:]) if cut.interleaved else np.concatenate(inputs)
        if cut.transposed:
            rows = rows.T
        return (np.ascontiguousarray(rows).reshape(rewrite.outputs[0].shape),)


def _rewrites(gathered: Gathered) -> Iterator[Rewrite]:
    whole, stack = gathered.whole, gathered.stack
    transposed = stack.axes == ("in", "out") and not gathered.is_bias
    cut = ExpertCut(len(stack.parts), transposed, stack.interleaved)
    rows = whole.rows // len(gathered.experts)
    computes = transposed or cut.interleaved or (gathered.is_bias and cut.parts > 1)
    step = rows // cut.parts
    for expert, parts in enumerate(gathered.experts):
        first = expert * rows
        if computes:
            yield Rewrite(tuple(map(Region, parts)), (Region(whole, first, first + rows),), False, cut)
            continue
        for number, part in enumerate(parts):
            start = first + number * step
            yield Rewrite((Region(part),), (Region(whole, start, start + step),), True)

"""Store the experts of a layer one by one, however they are stacked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tensorsurgeon.errors import NoMatchError, PlanViolationError
from tensorsurgeon.models.selecting import selected
from tensorsurgeon.models.stacks import ExpertCut, Stacked, stacked_tensors
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class SplitExperts:
    """Turn each stack of experts that ``where`` selects into one linear per expert and part, as engines name them.

    Stacks are told by the family's table, else by name and shape; SpecError for one that neither explains. What lies in
    one piece moves as bytes. A transposed or interleaved expert is a piece of work of its own, never the whole stack.
    """

    reversible: ClassVar[bool] = True

    where: tuple[str, ...] = ("role:expert", "maybe:role:mtp.expert")
    exclude: tuple[str, ...] = ()

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        chosen = selected(specs, self.where, self.exclude)
        stacks = {name: stacked for name, stacked in stacked_tensors(specs).items() if name in chosen}
        if chosen and not stacks and not all(text.startswith("maybe:") for text in self.where):
            raise NoMatchError(
                f"no stacked experts: all {len(chosen)} tensors that {', '.join(self.where)} selects are stored one by one"
            )
        return tuple(rewrite for stacked in stacks.values() for rewrite in _rewrites(stacked))

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        cut = rewrite.detail
        if not isinstance(cut, ExpertCut):
            raise PlanViolationError(f"{rewrite.inputs[0]}: split_experts moves bytes, and was asked to compute")
        (piece,) = inputs
        if rewrite.outputs[0].spec.shape[1:] == ():
            # A vector per expert, [1, parts * n]: its parts lie along the only axis.
            (rows,) = piece
        else:
            rows = piece.T if cut.transposed else piece
        return [np.ascontiguousarray(part) for part in _parts(rows, cut)]


def _parts(rows: Array, cut: ExpertCut) -> Iterator[Array]:
    each = len(rows) // cut.parts
    for number in range(cut.parts):
        yield rows[number :: cut.parts] if cut.interleaved else rows[number * each : (number + 1) * each]


def _rewrites(stacked: Stacked) -> Iterator[Rewrite]:
    spec, stack = stacked.spec, stacked.stack
    transposed = stack.axes == ("in", "out") and not stacked.is_bias
    cut = ExpertCut(len(stack.parts), transposed, stack.interleaved and len(stack.parts) > 1)
    leaf = "bias" if stacked.is_bias else "weight"
    rows = 1 if stacked.is_bias else spec.rows // stacked.experts
    if stacked.is_bias:
        shape: tuple[int, ...] = (spec.shape[1] // cut.parts,)
    else:
        out, in_ = (spec.shape[-1], rows) if transposed else (rows, spec.shape[-1])
        shape = (out // cut.parts, in_)
    for expert in range(stacked.experts):
        targets = [TensorSpec(f"{stacked.into}.{expert}.{part}.{leaf}", spec.dtype, shape) for part in stack.parts]
        first = expert * rows
        if transposed or (cut.interleaved) or (stacked.is_bias and cut.parts > 1):
            yield Rewrite((Region(spec, first, first + rows),), tuple(map(Region, targets)), False, cut)
            continue
        step = rows // cut.parts if not stacked.is_bias else 1
        for number, target in enumerate(targets):
            start = first + number * step
            yield Rewrite((Region(spec, start, start + step),), (Region(target),), True)

"""What a step reads, made alone: for those who want an array of a plan before its unit runs."""

from __future__ import annotations

from collections.abc import Sequence

from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.planning.resolving import Pieces, Resolved
from tensorsurgeon.planning.rewriting import Array, Transform
from tensorsurgeon.running.unit import check_produced, gather
from tensorsurgeon.tensors.spec import Region


def made_region(region: Region, pieces: Pieces, resolved: Resolved, steps: Sequence[Transform], source: Source) -> Array:
    """A region of a step's input, or of what all steps make, read from the source and taken through the steps before it."""
    made: dict[int, Array] = {}
    for piece in pieces:
        if piece.origin >= 0 or piece.origin in made:
            continue
        task = resolved.tasks[resolved.made[-1 - piece.origin][0]]
        inputs = [
            made_region(part, of, resolved, steps, source) for part, of in zip(task.rewrite.inputs, task.inputs, strict=True)
        ]
        arrays = steps[task.step].apply(task.rewrite, inputs)
        check_produced(task.rewrite, arrays)
        made.update(zip(task.outputs, arrays, strict=True))
    return gather(region, pieces, source, made)

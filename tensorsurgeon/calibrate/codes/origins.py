"""Of which lines of checkpoint tensors a weight is made, through every step before the one that quantizes it."""

from __future__ import annotations

from tensorsurgeon.calibrate.walk.lines import Lines
from tensorsurgeon.formats.coding import stored_in
from tensorsurgeon.models.stacks import ExpertCut
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.resolving import Piece, Pieces, Task
from tensorsurgeon.tensors.spec import Region


class Origins:
    """Looks up what a plan's weights are made of."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._specs = list(plan.source.specs.values())

    def lines(self, region: Region, pieces: Pieces) -> list[Lines] | None:
        """The lines that rows of a region are, in order; None where a step between makes something else of them.

        A module of a quantized source is named by the weight that its codes stand for.
        """
        result: list[Lines] = []
        for piece in pieces:
            found = self._of_piece(region, piece)
            if found is None:
                return None
            before = result[-1] if result else None
            if before is not None and before._replace(start=before.stop, stop=found.stop) == found:
                # A large weight is unpacked in pieces.
                result[-1] = before._replace(stop=found.stop)
            else:
                result.append(found)
        return result

    def _of_piece(self, region: Region, piece: Piece) -> Lines | None:
        origin, start, nbytes = piece
        width = region.spec.row_bytes
        if start % width or nbytes % width:
            return None
        first, last = start // width, (start + nbytes) // width
        if origin >= 0:
            spec = self._specs[origin]
            same = spec.dtype is region.spec.dtype and spec.row_bytes == width
            return Lines(spec.name, first, last) if same else None
        number, position = self._plan.resolved.made[-1 - origin]
        task = self._plan.resolved.tasks[number]
        detail, output = task.rewrite.detail, task.rewrite.outputs[position]
        if output.spec.row_bytes != width:
            return None
        if stored_in(detail) is not None:
            base = output.start or 0
            return Lines(output.spec.name, base + first, base + last)
        if isinstance(detail, ExpertCut):
            lines = self._of_cut(task, detail, position)
            return None if lines is None else lines.within(first, last)
        return None

    def _of_cut(self, task: Task, cut: ExpertCut, position: int) -> Lines | None:
        """The lines of one part of an expert, which lies in whole rows of one tensor."""
        found = self.lines(task.rewrite.inputs[0], task.inputs[0])
        if found is None or len(found) != 1 or found[0].turned or found[0].step != 1:
            return None
        rows = found[0]
        if cut.transposed:
            if rows.start % rows.total:
                return None
            outputs = task.rewrite.inputs[0].shape[-1]
            first, turned = rows.start // rows.total * outputs, rows.total
        else:
            outputs, first, turned = rows.total, rows.start, 0
        each = outputs // cut.parts
        start, step = (first + position, cut.parts) if cut.interleaved else (first + position * each, 1)
        return Lines(rows.name, start, start + (each - 1) * step + 1, step, turned)

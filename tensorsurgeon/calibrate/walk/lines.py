"""Lines of a tensor: what the rows of a linear are in it, however it is stored.

A linear's row is a row of the tensor seen as ``[-1, last axis]``. Where weights are stored ``[in, out]`` it is a column of a
matrix instead: those of all matrices are counted one matrix after the other. Gate and up rows that alternate are lines
with a step of two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Lines(NamedTuple):
    """Lines ``start``, ``start + step``, ... below ``stop`` of a tensor or parameter.

    ``turned``: rows of each matrix whose columns are counted; 0 where rows are.
    """

    name: str
    start: int
    stop: int
    step: int = 1
    turned: int = 0

    @property
    def total(self) -> int:
        """How many."""
        return -(-(self.stop - self.start) // self.step)

    def within(self, first: int, last: int) -> Lines:
        """Those from the ``first`` to the one before the ``last``, counted in these."""
        start = self.start + first * self.step
        return self._replace(start=start, stop=start + (last - first - 1) * self.step + 1)


# (first line of a checkpoint tensor, the lines of a parameter that it and those behind it became).
Run = tuple[int, Lines]


def lines_of(parameter: Tensor, lines: Lines) -> Tensor:
    """A view [lines, in_features] of a parameter; columns have to be of one matrix."""
    flat = parameter.view(-1, parameter.shape[-1])
    if not lines.turned:
        return flat[lines.start : lines.stop : lines.step]
    number, first = divmod(lines.start, parameter.shape[-1])
    matrix = flat[number * lines.turned : (number + 1) * lines.turned].T
    return matrix[first : first + lines.stop - lines.start : lines.step]


@dataclass(frozen=True, slots=True)
class Traced:
    """``runs``: by checkpoint tensor, and 0 for its rows or the rows of the matrices whose columns are meant, in order.

    ``widths`` are the columns of the tensors.
    """

    runs: dict[tuple[str, int], list[Run]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    def became(self, lines: Lines) -> list[Lines] | None:
        """The parameter lines that lines of a checkpoint tensor became, in order; None if some became none."""
        runs = self.runs.get((lines.name, lines.turned))
        if runs is None and lines.turned:
            return self._of_rows(lines)
        result = []
        position = lines.start
        for first, target in runs or ():
            last = first + target.stop - target.start
            if last <= position or first >= lines.stop:
                continue
            if first > position:
                return None
            count = -(-(min(last, lines.stop) - position) // lines.step)
            start = target.start + position - first
            result.append(target._replace(start=start, stop=start + (count - 1) * lines.step + 1, step=lines.step))
            position += count * lines.step
        return result if position >= lines.stop else None

    def _of_rows(self, lines: Lines) -> list[Lines] | None:
        """Columns of matrices that lie below each other in a tensor of two axes: as its rows went, as one piece."""
        width = self.widths.get(lines.name, 0)
        if not width or lines.start // width != (lines.stop - 1) // width:
            return None
        number, first = divmod(lines.start, width)
        rows = self.became(Lines(lines.name, number * lines.turned, (number + 1) * lines.turned))
        if rows is None or len(rows) != 1 or rows[0].turned or rows[0].start % lines.turned:
            return None
        start = rows[0].start // lines.turned * width + first
        return [lines._replace(name=rows[0].name, start=start, stop=start + lines.stop - lines.start)]

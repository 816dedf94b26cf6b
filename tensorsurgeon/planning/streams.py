"""Weights that go from codes to codes row block by row block, so that no float weight is ever whole.

A step that makes rows of a float weight one after the other (``gives_rows``, ``rows``) and a step that takes them so
(``takes_rows``, ``apply_rows``) need not hold the weight between them. A class has these methods or has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tensorsurgeon.planning.resolving import Task
from tensorsurgeon.planning.rewriting import Transform


class Stream(NamedTuple):
    """Tasks by their number within the unit: what takes rows, and for each of its inputs what gives them, in their order."""

    taker: int
    givers: tuple[tuple[int, ...], ...]


def streams_of(tasks: Sequence[Task], steps: Sequence[Transform]) -> dict[int, Stream]:
    """By the number of the task that takes rows, the streams of a unit whose tasks these are."""
    if len(tasks) < 2:
        return {}
    maker = {origin: number for number, task in enumerate(tasks) for origin in task.outputs}
    found = {}
    for number, task in enumerate(tasks):
        if not _can(steps, task, "takes_rows"):
            continue
        givers = tuple(tuple(maker.get(piece.origin, -1) for piece in pieces) for pieces in task.inputs)
        if all(_gives_all(tasks, steps, task, place, numbers) for place, numbers in enumerate(givers)):
            found[number] = Stream(number, givers)
    return found


def _gives_all(tasks: Sequence[Task], steps: Sequence[Transform], taker: Task, place: int, givers: tuple[int, ...]) -> bool:
    """Whether an input is the whole outputs of tasks that give rows, one behind the other."""
    if not givers or taker.rewrite.inputs[place].start is not None:
        return False
    for piece, number in zip(taker.inputs[place], givers, strict=True):
        if number < 0 or len(tasks[number].outputs) != 1 or not _can(steps, tasks[number], "gives_rows"):
            return False
        if piece.start or piece.nbytes != tasks[number].rewrite.outputs[0].byte_range[1]:
            return False
    return True


def _can(steps: Sequence[Transform], task: Task, what: str) -> bool:
    stated = getattr(type(steps[task.step]), what, None)
    return stated is not None and bool(stated(steps[task.step], task.rewrite))

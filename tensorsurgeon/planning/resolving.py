"""From rewrites to work: which bytes are copied, which arrays are made, and what must go together.

Byte moves are resolved here and vanish: every tensor is a list of pieces, each a range of bytes of an *origin*,
which is a source tensor or an array that some task makes. Splitting a fused tensor, renaming it and stacking it
again leaves pieces of the source, which are copied; only tasks that compute something remain. Tasks that
feed each other form a unit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from tensorsurgeon.errors import PlanError, SpecError
from tensorsurgeon.planning.rewriting import Rewrite, Transform, advance
from tensorsurgeon.tensors.spec import Region, SpecMap


class Piece(NamedTuple):
    """A range of bytes of an origin: source tensor ``origin`` if it is >= 0, else array ``-1 - origin`` of a task."""

    origin: int
    start: int
    nbytes: int


Pieces = tuple[Piece, ...]


class Task(NamedTuple):
    """One rewrite that computes; ``outputs`` are the origins of its arrays, one per output region."""

    step: int
    rewrite: Rewrite
    inputs: tuple[Pieces, ...]
    outputs: Sequence[int]


class Resolved(NamedTuple):
    """All steps taken: the final tensors as pieces, the tasks, and the rewrites of each step."""

    specs: SpecMap
    contents: dict[str, Pieces]
    tasks: list[Task]
    # made[k] is the task and the output position that origin -1 - k stands for.
    made: list[tuple[int, int]]
    rewrites: list[tuple[Rewrite, ...]]


def resolve(steps: Sequence[Transform], source: SpecMap) -> Resolved:
    """Plan every step in turn and express the result in bytes of the source and arrays of tasks."""
    specs = source
    contents = _Contents(source)
    rewrites_of_steps = []
    for number, step in enumerate(steps):
        rewrites = step.plan(specs)
        specs_after = advance(specs, rewrites)
        _check_inputs(specs, rewrites)
        _check_arrays(specs, specs_after, rewrites)
        contents.take(number, rewrites)
        rewrites_of_steps.append(rewrites)
        specs = specs_after
    _check_bytes(specs, contents.pieces)
    return Resolved(specs, contents.pieces, contents.tasks, contents.made, rewrites_of_steps)


class _Contents:
    """Of what pieces each tensor consists, while steps are taken one after the other."""

    def __init__(self, source: SpecMap) -> None:
        self.pieces: dict[str, Pieces] = {
            spec.name: (Piece(number, 0, spec.nbytes),) if spec.nbytes else () for number, spec in enumerate(source.values())
        }
        self.tasks: list[Task] = []
        self.made: list[tuple[int, int]] = []

    def take(self, step: int, rewrites: Sequence[Rewrite]) -> None:
        """Replace the tensors that a step reads by those that it makes."""
        whole: dict[str, Pieces] = {}
        partial: dict[str, list[tuple[int, Pieces]]] = defaultdict(list)
        ends: dict[str, list[int]] = {}
        known = self.pieces
        for rewrite in rewrites:
            read, written, moves_bytes, _ = rewrite
            inputs = [known[region[0][0]] if region[1] is None else _cut(known[region[0][0]], region, ends) for region in read]
            if not moves_bytes:
                outputs = self._made(step, rewrite, inputs)
            elif len(read) == len(written) == 1:
                # By far the commonest: one tensor or slice under a new name.
                outputs = inputs
            else:
                outputs = _move(rewrite, inputs)
            for region, pieces in zip(written, outputs, strict=True):
                if region[1] is None:
                    whole[region[0][0]] = pieces
                else:
                    partial[region[0][0]].append((region.byte_range[0], pieces))
        for name in {region[0][0] for rewrite in rewrites for region in rewrite[0]}:
            del self.pieces[name]
        self.pieces.update(whole)
        for name, parts in partial.items():
            parts.sort(key=lambda part: part[0])
            self.pieces[name] = _joined([piece for _, pieces in parts for piece in pieces])

    def _made(self, step: int, rewrite: Rewrite, inputs: Sequence[Pieces]) -> list[Pieces]:
        """The arrays of a new task, one per output."""
        number, origin, written = len(self.tasks), -1 - len(self.made), rewrite[1]
        self.tasks.append(Task(step, rewrite, tuple(inputs), range(origin, origin - len(written), -1)))
        self.made += [(number, position) for position in range(len(written))]
        outputs: list[Pieces] = []
        for region in written:
            nbytes = region[0].nbytes if region[1] is None else region.byte_range[1]
            outputs.append((Piece(origin, 0, nbytes),) if nbytes else ())
            origin -= 1
        return outputs


def _check_arrays(specs: SpecMap, specs_after: SpecMap, rewrites: Sequence[Rewrite]) -> None:
    """Only what has an array form can be computed with."""
    if all(dtype.numpy is not None for dtype in {spec[1] for known in (specs, specs_after) for spec in known.values()}):
        return
    for read, written, moves_bytes, _ in rewrites:
        for spec, _, _ in () if moves_bytes else (*read, *written):
            if spec.dtype.numpy is None:
                raise SpecError(f"{spec}: elements narrower than a byte have no array form; they can only be moved whole")


def _check_bytes(specs: SpecMap, contents: dict[str, Pieces]) -> None:
    """Every tensor has exactly its bytes: a step that says it moves bytes may not change how many there are."""
    for name, spec in specs.items():
        pieces = contents[name]
        found = pieces[0][2] if len(pieces) == 1 else sum(piece[2] for piece in pieces)
        if found != spec.nbytes:
            raise PlanError(f"{spec}: takes {spec.nbytes} bytes, but the steps that make it move {found}")


def _check_inputs(specs: SpecMap, rewrites: Sequence[Rewrite]) -> None:
    for rewrite in rewrites:
        for spec, _, _ in rewrite[0]:
            found = specs.get(spec[0])
            if found is not spec and found != spec:
                raise PlanError(f"{spec}: a step plans to read this tensor, but it is {found}")


def _cut(pieces: Pieces, region: Region, ends: dict[str, list[int]]) -> Pieces:
    """The pieces that hold a region of the tensor made of ``pieces``.

    ``ends`` keeps where the pieces of a tensor end: one that was cut into hundreds is cut hundreds of times again.
    """
    begin, nbytes = region.byte_range
    if len(pieces) == 1:
        origin, start, _ = pieces[0]
        return (Piece(origin, start + begin, nbytes),) if nbytes else ()
    name = region.spec.name
    known = ends.get(name)
    if known is None:
        known = ends[name] = list(accumulate(p.nbytes for p in pieces))
    return _slice(pieces, known, begin, nbytes)


def _slice(pieces: Sequence[Piece], ends: Sequence[int], begin: int, nbytes: int) -> Pieces:
    if not nbytes:
        return ()
    result = []
    for number in range(bisect_right(ends, begin), len(pieces)):
        origin, start, length = pieces[number]
        position = ends[number] - length
        if position >= begin + nbytes:
            break
        low, high = max(begin, position), min(begin + nbytes, position + length)
        result.append(Piece(origin, start + low - position, high - low))
    return tuple(result)


def _move(rewrite: Rewrite, inputs: Sequence[Pieces]) -> list[Pieces]:
    pieces = [p for piece in inputs for p in piece]
    ends = list(accumulate(p.nbytes for p in pieces))
    result = []
    position = 0
    for region in rewrite.outputs:
        nbytes = region.byte_range[1]
        result.append(_slice(pieces, ends, position, nbytes))
        position += nbytes
    return result


def _joined(pieces: Sequence[Piece]) -> Pieces:
    """Neighbours that follow each other in one origin become one piece: splitting and fusing again is one copy."""
    result: list[Piece] = []
    for piece in pieces:
        if result:
            origin, start, nbytes = result[-1]
            if origin == piece.origin and start + nbytes == piece.start:
                result[-1] = Piece(origin, start, nbytes + piece.nbytes)
                continue
        result.append(piece)
    return tuple(result)


def units_of(tasks: Sequence[Task], made: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Tasks that feed each other, grouped: connected components, each in order, ordered by first task."""
    if not any(piece.origin < 0 for task in tasks for pieces in task.inputs for piece in pieces):
        return [[number] for number in range(len(tasks))]
    parent = list(range(len(tasks)))

    def root(task: int) -> int:
        while parent[task] != task:
            parent[task] = parent[parent[task]]
            task = parent[task]
        return task

    for number, task in enumerate(tasks):
        for pieces in task.inputs:
            for piece in pieces:
                if piece.origin < 0:
                    a, b = root(made[-1 - piece.origin][0]), root(number)
                    parent[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(tasks)):
        groups[root(number)].append(number)
    return [groups[key] for key in sorted(groups)]

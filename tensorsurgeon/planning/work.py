"""The work of a plan: copies, and units that compute, each with what it holds at its fullest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.layout import Layout
from tensorsurgeon.planning.resolving import Resolved, Task, units_of
from tensorsurgeon.planning.rewriting import Transform, scratch_bytes
from tensorsurgeon.planning.streams import streams_of

# Long copies are cut, so that workers share them and a stopped run loses little; short ones are put together.
COPY_BYTES = 32 << 20


class Copy(NamedTuple):
    """Bytes that go from a source shard to an output shard as they are."""

    source_shard: int
    source_offset: int
    nbytes: int
    shard: int
    offset: int


class Write(NamedTuple):
    """Bytes of a made array that go to an output shard."""

    origin: int
    start: int
    nbytes: int
    shard: int
    offset: int


class Unit(NamedTuple):
    """The smallest piece of work that can go alone; ``peak_bytes`` is what it holds at its fullest."""

    tasks: tuple[Task, ...]
    writes: tuple[Write, ...]
    copies: tuple[Copy, ...]
    peak_bytes: int

    @property
    def written_bytes(self) -> int:
        return sum(w.nbytes for w in self.writes) + sum(c.nbytes for c in self.copies)


def plan_units(resolved: Resolved, source: Checkpoint, layout: Layout, steps: Sequence[Transform]) -> tuple[Unit, ...]:
    """All the work of a plan, in the order of the source, so that a cold disk is read from front to back."""
    writes: list[list[Write]] = [[] for _ in resolved.tasks]
    copies: list[Copy] = []
    locations = source.locations
    made = resolved.made
    for name, pieces in resolved.contents.items():
        shard, position = layout.placements[name]
        for origin, start, nbytes in pieces:
            if origin < 0:
                writes[made[-1 - origin][0]].append(Write(origin, start, nbytes, shard, position))
            else:
                where = locations[origin]
                copies.append(Copy(where.shard, where.offset + start, nbytes, shard, position))
            position += nbytes
    keyed = [(_read_position(unit, locations), unit) for unit in _computing_units(resolved, writes, steps)]
    keyed += [((unit.copies[0].source_shard, unit.copies[0].source_offset), unit) for unit in _copy_units(copies)]
    keyed.sort(key=lambda pair: pair[0])
    return tuple(unit for _, unit in keyed)


def _computing_units(resolved: Resolved, writes: list[list[Write]], steps: Sequence[Transform]) -> Iterator[Unit]:
    tasks = resolved.tasks
    peaks = Peaks(steps)
    for numbers in units_of(tasks, resolved.made):
        members = tuple(tasks[n] for n in numbers)
        yield Unit(members, tuple(w for n in numbers for w in writes[n]), (), peaks.of(members))


def shards_read(unit: Unit, locations: Sequence[tuple[int, int]]) -> frozenset[int]:
    """The source shards that a unit reads, by number; ``locations`` are those of the source's tensors."""
    copied = {copy.source_shard for copy in unit.copies}
    origins = {piece.origin for task in unit.tasks for pieces in task.inputs for piece in pieces if piece.origin >= 0}
    return frozenset(copied | {locations[origin][0] for origin in origins})


class Peaks:
    """What units hold at their fullest: every array to its end, and the scratch of one task at a time; of a weight that goes
    row block by row block nothing but what gives the rows and what takes them.

    A model has few forms of tasks and many tasks, and each form is asked for its scratch once.
    """

    def __init__(self, steps: Sequence[Transform]) -> None:
        self._steps = steps
        self._alone: dict[tuple[object, ...], int] = {}

    def of(self, tasks: Sequence[Task]) -> int:
        """Bytes that a unit of these tasks holds."""
        if len(tasks) > 1:
            return self._together(tasks)
        # Nothing but names tells such tasks apart; details are few objects, and rewrites keep them alive.
        step, rewrite = tasks[0][:2]
        inputs, outputs, _, detail = rewrite
        form = (step, id(detail), *[(spec[1], spec[2], start, stop) for spec, start, stop in (*inputs, *outputs)])
        known = self._alone.get(form)
        if known is None:
            known = self._alone[form] = self._together(tasks)
        return known

    def _together(self, tasks: Sequence[Task]) -> int:
        streams = streams_of(tasks, self._steps)
        streamed = {number for stream in streams.values() for givers in stream.givers for number in givers}
        held, most = 0, 0
        for number, task in enumerate(tasks):
            scratch = scratch_bytes(self._steps[task.step], task.rewrite)
            if number in streams:
                # What gives rows is there one by one, and the rows themselves are part of its scratch.
                held += sum(region.byte_range[1] for region in task.rewrite.outputs)
                givers = {n for numbers in streams[number].givers for n in numbers}
                most = max(most, scratch + max(self._giving(tasks[n]) for n in givers))
            elif number not in streamed:
                held += _held_bytes(task)
                most = max(most, scratch)
        return held + most

    def _giving(self, task: Task) -> int:
        read = sum(piece.nbytes for pieces in task.inputs for piece in pieces)
        return read + scratch_bytes(self._steps[task.step], task.rewrite)


def _held_bytes(task: Task) -> int:
    """Bytes of the arrays that a task adds: what it makes, and the inputs that are not another task's array."""
    held = 0
    for region in task.rewrite.outputs:
        held += region.byte_range[1]
    for pieces in task.inputs:
        for piece in pieces:
            if piece.origin >= 0 or len(pieces) > 1:
                held += piece.nbytes
    return held


def _read_position(unit: Unit, locations: Sequence[tuple[int, int]]) -> tuple[int, int]:
    for task in unit.tasks:
        for pieces in task.inputs:
            for piece in pieces:
                if piece.origin >= 0:
                    shard, offset = locations[piece.origin]
                    return shard, offset + piece.start
    return 0, 0


def _copy_units(copies: list[Copy]) -> Iterator[Unit]:
    copies.sort()
    merged: list[Copy] = []
    for copy in copies:
        if merged:
            last = merged[-1]
            follows = (last.source_shard, last.source_offset + last.nbytes, last.shard, last.offset + last.nbytes)
            if follows == (copy.source_shard, copy.source_offset, copy.shard, copy.offset):
                merged[-1] = last._replace(nbytes=last.nbytes + copy.nbytes)
                continue
        merged.append(copy)
    batch: list[Copy] = []
    filled = 0
    for copy in merged:
        for start in range(0, copy.nbytes, COPY_BYTES):
            nbytes = min(COPY_BYTES, copy.nbytes - start)
            part = Copy(copy.source_shard, copy.source_offset + start, nbytes, copy.shard, copy.offset + start)
            # One shard each: a source that comes shard by shard keeps none for the sake of the next.
            if batch and (filled + nbytes > COPY_BYTES or batch[-1].source_shard != copy.source_shard):
                yield Unit((), (), tuple(batch), 0)
                batch, filled = [], 0
            batch.append(part)
            filled += nbytes
    if batch:
        yield Unit((), (), tuple(batch), 0)

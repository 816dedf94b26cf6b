"""Run a plan: units on threads within a memory budget, digests, and a journal written behind durable data.

Threads serve, for reading, writing, copying and the compiled kernels all let go of the interpreter. Nothing here
decides what is written: workers, memory cap and order change no byte.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import xxhash

from tensorsurgeon.checkpoint.sink import Sink
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.errors import Interrupted, SurgeonError
from tensorsurgeon.planning.plan import Copy, Plan, Unit
from tensorsurgeon.planning.resolving import Pieces, Task
from tensorsurgeon.planning.rewriting import Array, Transform
from tensorsurgeon.running.checks import check_produced
from tensorsurgeon.running.journal import Journal
from tensorsurgeon.running.work_queue import WorkQueue, warming_up
from tensorsurgeon.tensors.arrays import Workspace, empty, workspace_of_thread
from tensorsurgeon.tensors.spec import Region

# Data is made durable and journalled in batches, for a sync per unit would cost more than the unit; in small ones, so
# that the disk is busy from the start. What is finished during a sync goes with the next.
COMMIT_BYTES = 32 << 20
# Small enough for a core's own cache: bytes are read, digested and written while they are warm. The kernel's own
# ``copy_file_range`` moves 64 KB at a time under the file's lock, and leaves the digest to read them again.
_COPY_BUFFER = 1 << 20


class UnitResult(NamedTuple):
    """What a finished unit wrote."""

    unit: int
    digests: list[str]
    nbytes: int


class Progress(NamedTuple):
    """Told after each unit; ``nbytes`` are the bytes it wrote."""

    nbytes: int


def run_units(
    plan: Plan,
    source: Source,
    sink: Sink,
    journal: Journal,
    *,
    done: dict[int, list[str]],
    workers: int,
    max_ram_bytes: int,
    stop: threading.Event,
    progress: Callable[[Progress], None] = lambda _: None,
    only: Iterable[int] | None = None,
) -> dict[int, list[str]]:
    """Run every unit that is not done, or those of ``only``; returns the digests of all that are done by then.

    The first error stops the others in order, after what is finished was journalled. ``stop`` does the same from
    outside and ends in Interrupted.
    """
    todo = [number for number in (range(len(plan.units)) if only is None else only) if number not in done]
    with warming_up(plan, todo) as is_warm:
        run = _Run(plan, source, sink, journal, max_ram_bytes, stop, progress)
        run.go(WorkQueue(plan, todo, is_warm), workers, len(todo))
    return {**done, **run.digests}


class _Run:
    def __init__(
        self,
        plan: Plan,
        source: Source,
        sink: Sink,
        journal: Journal,
        max_ram_bytes: int,
        stop: threading.Event,
        progress: Callable[[Progress], None],
    ) -> None:
        self.plan = plan
        self.source = source
        self.sink = sink
        self.journal = journal
        self.budget = max_ram_bytes
        self.stop = stop
        self.progress = progress
        self.digests: dict[int, list[str]] = {}
        self._in_flight = 0
        self._admission = threading.Condition()
        self._finished: list[UnitResult] = []
        self._uncommitted = 0
        self._failed = threading.Event()
        self._over = False

    def go(self, queue: WorkQueue, workers: int, count: int) -> None:
        with ThreadPoolExecutor(workers + 1, thread_name_prefix="surgeon") as pool:
            committing = pool.submit(self._commit_behind)
            futures = [pool.submit(self._work, queue) for _ in range(workers)]
            try:
                wait(futures)
            except BaseException:
                # A second Ctrl-C while waiting: let the workers end their unit all the same.
                self.stop.set()
                wait(futures)
                raise
            finally:
                with self._admission:
                    self._over = True
                    self._admission.notify_all()
        errors = [error for future in (*futures, committing) if (error := future.exception()) is not None]
        try:
            # After a sync that failed the kernel may call lost pages clean: what came after it is not claimed.
            if committing.exception() is None:
                self._commit()
        except SurgeonError:
            # A full disk takes no journal line either; what stopped the run is the better message.
            if not errors:
                raise
        if errors:
            raise errors[0]
        if self.stop.is_set() and len(self.digests) < count:
            raise Interrupted(f"stopped after {len(self.digests)} of {count} units; what is done is kept")

    def _work(self, queue: WorkQueue) -> None:
        with workspace_of_thread() as workspace:
            while (number := self._admit(queue)) is not None:
                unit = self.plan.units[number]
                try:
                    try:
                        digests = run_unit(unit, self.plan, self.source, self.sink, workspace)
                    finally:
                        with self._admission:
                            self._in_flight -= unit.peak_bytes
                            self._admission.notify_all()
                    self._finish(UnitResult(number, digests, unit.written_bytes))
                except BaseException:
                    self._fail()
                    raise

    def _fail(self) -> None:
        self._failed.set()
        with self._admission:
            self._admission.notify_all()

    def _admit(self, queue: WorkQueue) -> int | None:
        """The next unit, as soon as it fits the budget beside those under way; None when there is no more to do."""
        with self._admission:
            while not (self._failed.is_set() or self.stop.is_set()) and (number := queue.peek()) is not None:
                peak = self.plan.units[number].peak_bytes
                if not self._in_flight or self._in_flight + peak <= self.budget:
                    queue.take()
                    self._in_flight += peak
                    return number
                self._admission.wait()
            self._admission.notify_all()
            return None

    def _finish(self, result: UnitResult) -> None:
        with self._admission:
            self._finished.append(result)
            self.digests[result.unit] = result.digests
            self._uncommitted += result.nbytes
            self._admission.notify_all()
        self.progress(Progress(result.nbytes))

    def _commit_behind(self) -> None:
        """Make finished units durable and journal them, batch by batch, while the workers go on."""
        try:
            while True:
                with self._admission:
                    self._admission.wait_for(lambda: self._over or self._uncommitted >= COMMIT_BYTES)
                    if self._over:
                        return
                self._commit()
        except BaseException:
            # Where a sync or the journal fails, what the workers write from here on might not last.
            self._fail()
            raise

    def _commit(self) -> None:
        with self._admission:
            batch, self._finished = self._finished, []
            self._uncommitted = 0
        if batch:
            self.sink.sync()
            self.journal.append((result.unit, result.digests) for result in batch)


def run_unit(unit: Unit, plan: Plan, source: Source, sink: Sink, workspace: Workspace) -> list[str]:
    """Read, apply, compare, write at the offset; the digest of each range written, in the unit's order."""
    workspace.reset()
    made: dict[int, Array] = {}
    for task in unit.tasks:
        arrays = _apply(task, plan.steps, source, plan, made)
        made.update(zip(task.outputs, arrays, strict=True))
    digests = []
    for write in unit.writes:
        data = _bytes_of(made[write.origin])[write.start : write.start + write.nbytes]
        sink.write(write.shard, write.offset, data)
        digests.append(xxhash.xxh3_64_hexdigest(data))
    if unit.copies:
        # One buffer for all: a unit may hold thousands of short copies.
        buffer = empty((min(_COPY_BUFFER, max(copy.nbytes for copy in unit.copies)),), np.uint8).data
        digests += [_copy(copy, source, sink, buffer) for copy in unit.copies]
    return digests


def _bytes_of(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _apply(task: Task, steps: Sequence[Transform], source: Source, plan: Plan, made: dict[int, Array]) -> Sequence[Array]:
    inputs = [
        _gather(region, pieces, source, plan, made) for region, pieces in zip(task.rewrite.inputs, task.inputs, strict=True)
    ]
    arrays = steps[task.step].apply(task.rewrite, inputs)
    check_produced(task.rewrite, arrays)
    return arrays


def _gather(region: Region, pieces: Pieces, source: Source, plan: Plan, made: dict[int, Array]) -> Array:
    """The array of an input region: read from the source, taken from an earlier task, or put together from both."""
    dtype = region.spec.dtype.numpy
    assert dtype is not None  # ops refuse elements narrower than a byte when they plan
    shape = region.shape
    if len(pieces) == 1 and pieces[0].origin < 0:
        _, start, nbytes = pieces[0]
        flat = made[pieces[0].origin].reshape(-1).view(np.uint8)[start : start + nbytes]
        array = flat.view(dtype).reshape(shape)
        array.flags.writeable = False
        return array
    array = empty(shape, dtype)
    if array.size:
        view = array.reshape(-1).view(np.uint8).data
        position = 0
        for origin, start, nbytes in pieces:
            part = view[position : position + nbytes]
            if origin < 0:
                part[:] = _bytes_of(made[origin])[start : start + nbytes]
            else:
                where = plan.source.locations[origin]
                source.read_into(where.shard, where.offset + start, part)
            position += nbytes
    # An op that wrote into its input would change what the next task reads.
    array.flags.writeable = False
    return array


def _copy(copy: Copy, source: Source, sink: Sink, buffer: memoryview) -> str:
    """Move bytes through a buffer, never as a tensor; returns their digest."""
    digest = xxhash.xxh3_64()
    for start in range(0, copy.nbytes, len(buffer)):
        part = buffer[: copy.nbytes - start]
        source.read_into(copy.source_shard, copy.source_offset + start, part)
        digest.update(part)
        sink.write(copy.shard, copy.offset + start, part)
    return digest.hexdigest()

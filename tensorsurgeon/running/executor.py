"""Run a plan: units on threads within a memory budget, digests, and a journal written behind durable data.

Threads serve, for reading, writing, copying and the compiled kernels all let go of the interpreter. Nothing here
decides what is written: workers, memory cap and order change no byte.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

from tensorsurgeon.checkpoint.sink import Sink
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.errors import Interrupted, SurgeonError
from tensorsurgeon.planning.pace import Pace
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.running.journal import Journal
from tensorsurgeon.running.unit import CodesProvider, run_unit
from tensorsurgeon.running.work_queue import WorkQueue, warming_up
from tensorsurgeon.tensors.arrays import Workspace, workspace_of_thread

# Data is made durable and journalled in batches, for a sync per unit would cost more than the unit; in small ones, so
# that the disk is busy from the start. What is finished during a sync goes with the next.
COMMIT_BYTES = 32 << 20


# Experts and pieces of large weights fit; what is larger is rare.
_KEPT_BYTES = 32 << 20


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
    codes: CodesProvider | None = None,
) -> dict[int, list[str]]:
    """Run every unit that is not done, or those of ``only``; returns the digests of all that are done by then.

    ``codes`` hands over what calibration chose for the rewrites whose method asks for it. Whoever gives ``only`` has told a
    source that is streamed what will be read.

    The first error stops the others in order, after what is finished was journalled. ``stop`` does the same from
    outside and ends in Interrupted.
    """
    todo = [number for number in (range(len(plan.units)) if only is None else only) if number not in done]
    pace = None
    if source.is_streamed and only is None:
        pace = Pace(plan, todo)
        todo = pace.order
        source.follow(pace.steps)
    with warming_up(plan, todo) as is_warm:
        run = _Run(plan, source, sink, journal, workers, max_ram_bytes, stop, progress, codes, pace)
        run.go(WorkQueue(plan, todo, is_warm, in_order=source.is_streamed), workers, len(todo))
    return {**done, **run.digests}


class _Run:
    def __init__(
        self,
        plan: Plan,
        source: Source,
        sink: Sink,
        journal: Journal,
        workers: int,
        max_ram_bytes: int,
        stop: threading.Event,
        progress: Callable[[Progress], None],
        codes: CodesProvider | None,
        pace: Pace | None,
    ) -> None:
        self.plan = plan
        self.pace = pace
        self.codes = codes
        self.source = source
        self.sink = sink
        self.journal = journal
        self.budget = max_ram_bytes
        # A worker counts for at least this much, and may keep as much between units: the pages of large units, given back for
        # each small one between them, cost more than the arithmetic.
        self._share = min(plan.peak_unit_bytes, max_ram_bytes // workers, _KEPT_BYTES)
        self.stop = stop
        self.progress = progress
        self.digests: dict[int, list[str]] = {}
        self._in_flight = 0
        self._admission = threading.Condition()
        self._finished: list[UnitResult] = []
        self._uncommitted = 0
        # Whether a shard of the source waits for the journal alone to make room for the next.
        self._is_awaited = False
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
            # Whoever waited for bytes of the source was told to stop because another failed.
            raise next((error for error in errors if not isinstance(error, Interrupted)), errors[0])
        if self.stop.is_set() and len(self.digests) < count:
            raise Interrupted(f"stopped after {len(self.digests)} of {count} units; what is done is kept")

    def _work(self, queue: WorkQueue) -> None:
        held = 0
        with workspace_of_thread() as workspace:
            while (number := self._admit(queue, workspace, held)) is not None:
                unit = self.plan.units[number]
                # Given back when the next unit is asked for: until then the workspace keeps its buffers.
                held = max(unit.peak_bytes, self._share)
                try:
                    digests = run_unit(unit, self.plan.steps, self.source, self.sink, workspace, self.codes, held)
                    self._finish(UnitResult(number, digests, unit.written_bytes))
                except BaseException:
                    with self._admission:
                        self._in_flight -= held
                    self._fail()
                    raise

    def _fail(self) -> None:
        self._failed.set()
        self.source.give_up()
        with self._admission:
            self._admission.notify_all()

    def _admit(self, queue: WorkQueue, workspace: Workspace, held: int) -> int | None:
        """The next unit, as soon as it fits the budget beside those under way; None when there is no more to do.

        ``held`` is what the worker had for its unit before. While it waits, and when it is done, it keeps nothing.
        """
        with self._admission:
            self._in_flight -= held
            self._admission.notify_all()
            while not (self._failed.is_set() or self.stop.is_set()) and (number := queue.peek()) is not None:
                needed = max(self.plan.units[number].peak_bytes, self._share)
                if not self._in_flight or self._in_flight + needed <= self.budget:
                    queue.take()
                    self._in_flight += needed
                    return number
                workspace.clear()
                self._admission.wait()
            workspace.clear()
            self._admission.notify_all()
            return None

    def _finish(self, result: UnitResult) -> None:
        with self._admission:
            self._finished.append(result)
            self.digests[result.unit] = result.digests
            self._uncommitted += result.nbytes
            self._is_awaited |= self.pace is not None and self.pace.finished(result.unit)
            self._admission.notify_all()
        self.progress(Progress(result.nbytes))

    def _commit_behind(self) -> None:
        """Make finished units durable and journal them, batch by batch, while the workers go on."""
        try:
            while True:
                with self._admission:
                    self._admission.wait_for(lambda: self._over or self._is_awaited or self._uncommitted >= COMMIT_BYTES)
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
            self._is_awaited = False
        if batch:
            self.sink.sync()
            self.journal.append((result.unit, result.digests) for result in batch)
            if self.pace is not None:
                with self._admission:
                    over = self.pace.journalled(result.unit for result in batch)
                for step in over:
                    self.source.passed(step)

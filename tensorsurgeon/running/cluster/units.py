"""Units of a plan on the nodes of a cluster: each from (op, rewrite, source, target) alone, written at its final offset.

Digests come back to this machine, which keeps the journal and publishes last. A unit that is done twice, because the node
that did it first was lost, writes the same bytes at the same place.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.layout import Layout
from tensorsurgeon.checkpoint.sink import Sink
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.errors import Interrupted, PlanError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.rewriting import Transform
from tensorsurgeon.planning.work import Unit
from tensorsurgeon.running.cluster.crew import Crew
from tensorsurgeon.running.cluster.shared import SharedFolders
from tensorsurgeon.running.executor import Progress
from tensorsurgeon.running.journal import Journal, state_folder
from tensorsurgeon.running.unit import CodesProvider, run_unit
from tensorsurgeon.tensors.arrays import workspace_of_thread

logger = logging.getLogger(__name__)

# Units go in parcels: one that takes milliseconds costs as much to send, and a sync costs the more the smaller it is.
_PARCEL_BYTES: Final = 64 << 20
_PARCEL_UNITS: Final = 256
# Parcels for each that works, so that nobody is left with a large one while the others have nothing to do.
_PARCELS_EACH: Final = 8


class Parcel(NamedTuple):
    """Units by number, and what the largest of them holds."""

    numbers: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class UnitsJob:
    """All that units need beside themselves; ``mark`` is a file that is there as long as their run lasts."""

    steps: Sequence[Transform]
    source: Checkpoint
    layout: Layout
    target: Path
    mark: Path
    codes: CodesProvider | None

    def open(self) -> UnitsDesk:
        """Source and output, opened in this process."""
        if not self.mark.exists():
            # A call that outlived its run: another may write there by now.
            raise Interrupted("the run that this belongs to has ended")
        return UnitsDesk(self)


class UnitsDesk:
    """Open files of one run on a node; threads share them."""

    def __init__(self, job: UnitsJob) -> None:
        self._job = job
        self._source = Source(job.source)
        self._sink = Sink(job.target, job.layout)
        self._sink.join()
        self._syncing = threading.Lock()

    def do(self, units: Sequence[Unit]) -> list[list[str]]:
        """The digests of each unit, whose bytes are durable."""
        most = max(unit.peak_bytes for unit in units)
        with workspace_of_thread() as workspace:
            job = self._job
            digests = [run_unit(unit, job.steps, self._source, self._sink, workspace, job.codes, most) for unit in units]
        with self._syncing:
            self._sink.sync()
        return digests

    def close(self) -> None:
        """Let go of the files."""
        self._source.close()
        self._sink.close()


class RayMachines:
    """Runs units on the nodes of ``crew``, with the driver's journal."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew

    def check(self, plan: Plan, target: Path, least_bytes: int) -> None:
        """Raise PlanError and its kin unless every node sees source and target, has our versions and room for a unit."""
        if plan.source.snapshot is not None:
            raise PlanError(
                f"{plan.source} lies on the Hub, from where one machine fetches it; download it into a folder that all nodes "
                "share (hf download), or work without Ray"
            )
        had_target = target.exists()
        gate = SharedFolders(plan, target, max(least_bytes, plan.peak_unit_bytes))
        try:
            self.crew.gather(gate)
        finally:
            gate.tidy(had_target=had_target)
        logger.info("%s", ", ".join(f"node {m.node}: {m.slots} at once" for m in self.crew.members.values()))

    def run_units(
        self,
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
        """What ``executor.run_units`` does; the crew knows how many units, and of how many bytes, each node does at once."""
        todo = [number for number in (range(len(plan.units)) if only is None else only) if number not in done]
        slots = sum(member.slots for member in self.crew.members.values())
        parcels = list(_parcels(plan.units, todo, slots))
        digests: dict[int, list[str]] = {}

        def take(number: int, made: list[list[str]]) -> None:
            numbers = parcels[number].numbers
            journal.append(zip(numbers, made, strict=True))
            digests.update(zip(numbers, made, strict=True))
            for unit in numbers:
                progress(Progress(plan.units[unit].written_bytes))

        # Headers and sizes reach the file system before others write beside them.
        sink.sync()
        mark = state_folder(sink.target).absolute() / f"ray-{uuid.uuid4().hex}"
        mark.touch()
        job = UnitsJob(plan.steps, absolute(plan.source), plan.layout, sink.target.absolute(), mark, codes)
        try:
            with self.crew.session(job) as session:
                self.crew.run(
                    session,
                    [[plan.units[number] for number in parcel.numbers] for parcel in parcels],
                    nbytes=[parcel.nbytes for parcel in parcels],
                    stop=stop,
                    take=take,
                )
        finally:
            mark.unlink(missing_ok=True)
        if stop.is_set() and len(digests) < len(todo):
            raise Interrupted(f"stopped after {len(digests)} of {len(todo)} units; what is done is kept")
        return {**done, **digests}


def _parcels(units: Sequence[Unit], todo: Sequence[int], slots: int) -> Iterator[Parcel]:
    """Units in their order, cut so that each has something to do for a while and nobody has it all."""
    most = min(_PARCEL_BYTES, sum(units[number].written_bytes for number in todo) // (slots * _PARCELS_EACH or 1))
    numbers: list[int] = []
    filled = 0
    for number in todo:
        if numbers and (filled + units[number].written_bytes > most or len(numbers) == _PARCEL_UNITS):
            yield _parcel(units, numbers)
            numbers, filled = [], 0
        numbers.append(number)
        filled += units[number].written_bytes
    if numbers:
        yield _parcel(units, numbers)


def _parcel(units: Sequence[Unit], numbers: Sequence[int]) -> Parcel:
    return Parcel(tuple(numbers), max(units[number].peak_bytes for number in numbers))


def absolute(source: Checkpoint) -> Checkpoint:
    """The same checkpoint for a process that works in another folder."""
    shards = tuple(shard._replace(path=shard.path.absolute()) for shard in source.shards)
    return replace(source, root=source.root.absolute(), shards=shards)

"""The order of units where the source comes shard by shard: what the first shards suffice for goes first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tensorsurgeon.checkpoint.hub.stays import Stays
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.work import shards_read


class Pace:
    """Units in steps, one for each shard that some unit waits for last; not safe without the caller's lock.

    A step is over when all of its units are journalled: only then may a shard go that nothing later reads, for a run that
    is killed does again what the journal does not know.
    """

    def __init__(self, plan: Plan, units: Sequence[int]) -> None:
        read = {number: shards_read(plan.units[number], plan.source.locations) for number in units}
        last = {number: max(shards, default=0) for number, shards in read.items()}
        steps = {shard: step for step, shard in enumerate(sorted(set(last.values())))}
        self._step = {number: steps[shard] for number, shard in last.items()}
        self.order = sorted(units, key=lambda number: (self._step[number], number))
        self.steps: list[set[int]] = [set() for _ in steps]
        for number, shards in read.items():
            self.steps[self._step[number]] |= shards
        self._to_finish = Counter(self._step.values())
        self._to_journal = Counter(self._step.values())

    def finished(self, unit: int) -> bool:
        """A unit is written; whether that was the last of its step, which then waits for nothing but the journal."""
        step = self._step[unit]
        self._to_finish[step] -= 1
        return not self._to_finish[step]

    def journalled(self, units: Iterable[int]) -> list[int]:
        """Units are in the journal; the steps that are over by that."""
        over = []
        for unit in units:
            step = self._step[unit]
            self._to_journal[step] -= 1
            if not self._to_journal[step]:
                over.append(step)
        return over


class Streaming(NamedTuple):
    """What it takes to have the source shard by shard: shards and bytes that are fetched, and the most that lie here at once."""

    shards: int
    fetched_bytes: int
    spool_bytes: int
    ahead: int


def streaming_of(plan: Plan, ahead: int) -> Streaming | None:
    """What a run of a plan fetches, with ``ahead`` shards on their way before they are read; None for a source that is here."""
    if plan.source.snapshot is None:
        return None
    # What the cache holds is read there.
    sizes = [0 if shard.path.exists() else shard.file_bytes for shard in plan.source.shards]
    stays = Stays(Pace(plan, range(len(plan.units))).steps)
    fetched = {stay.shard for stay in stays.stays if sizes[stay.shard]}
    return Streaming(len(fetched), stays.fetched_bytes(sizes), stays.peak_bytes(sizes, ahead), ahead)

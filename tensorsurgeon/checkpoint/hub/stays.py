"""Which shards lie in the spool when: decided before the first is fetched, so that a plan can say what disk it takes.

A run goes through steps, each of which reads some shards. A shard stays from the first step that reads it to the last.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

DEFAULT_AHEAD: Final = 2
"""Shards that are fetched before they are read: one that comes while another waits, so that neither side idles."""


class Stay(NamedTuple):
    """A shard that is fetched for step ``first`` and let go after step ``last``."""

    shard: int
    first: int
    last: int


class Stays:
    """All stays of a run, in the order in which they begin."""

    def __init__(self, steps: Sequence[Collection[int]], keep_steps: int | None = None) -> None:
        """``steps`` are the shards that each reads. A shard that is read again within ``keep_steps`` steps is kept meanwhile.

        None keeps it whenever it is read again; otherwise it comes again, which costs no disk but the time to fetch it.
        """
        found: list[Stay] = []
        open_stays: dict[int, Stay] = {}
        for number, shards in enumerate(steps):
            for shard in sorted(shards):
                before = open_stays.get(shard)
                if before is not None and (keep_steps is None or number - before.last <= keep_steps):
                    open_stays[shard] = before._replace(last=number)
                else:
                    if before is not None:
                        found.append(before)
                    open_stays[shard] = Stay(shard, number, number)
        self.stays = sorted((*found, *open_stays.values()), key=lambda stay: (stay.first, stay.shard))
        # Steps that fetch nothing new are not counted when it is said how far ahead the fetching may be.
        self._fetching = sorted({stay.first for stay in self.stays})

    def rank(self, step: int) -> int:
        """How many steps fetch something up to this one."""
        return bisect_right(self._fetching, step)

    def held(self, step: int) -> set[int]:
        """The shards that are here during all of a step."""
        return {stay.shard for stay in self.stays if stay.first <= step <= stay.last}

    def gone_before(self, number: int, ahead: int) -> int:
        """Stays whose ``rank(last)`` is below this are over before stay ``number`` is fetched.

        No step that comes before it needs any but those that are left, so that a run which waits for room will get it.
        """
        return self.rank(self.stays[number].first) - ahead

    def peak_bytes(self, sizes: Sequence[int], ahead: int) -> int:
        """The most bytes that lie in the spool at once."""
        most = 0
        for number in range(len(self.stays)):
            limit = self.gone_before(number, ahead)
            most = max(most, sum(sizes[stay.shard] for stay in self.stays[: number + 1] if self.rank(stay.last) >= limit))
        return most

    def fetched_bytes(self, sizes: Sequence[int]) -> int:
        """Bytes that are fetched in all; what comes twice counts twice."""
        return sum(sizes[stay.shard] for stay in self.stays)

    def twice(self) -> list[int]:
        """Shards that are fetched more than once."""
        seen: set[int] = set()
        again = {stay.shard for stay in self.stays if stay.shard in seen or seen.add(stay.shard)}  # type: ignore[func-returns-value]
        return sorted(again)

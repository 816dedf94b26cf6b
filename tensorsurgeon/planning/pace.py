"""The order of units where the source comes shard by shard: what the first shards suffice for goes first."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.hub.stays import Stays
from tensorsurgeon.formats.coding import written_by
from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.models.roles import Role
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.work import shards_read

KEPT_LAYERS: Final = 3
"""A shard that a walk reads again after so many layers stays meanwhile; what is read again later comes again."""
# Fetching a shard for less than this share of it takes longer than asking for the bytes.
_WORTH: Final = 16
_LAYER: Final = re.compile(r"(.*?\b(?:layers|blocks|h))\.(\d+)\.")


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


class LayerPace:
    """A walk over layers: the shards that each step of it reads, and the units that can be done while these are here.

    ``steps`` are the shards of what comes before the layers, and of each layer; ``walked`` the units that the walk itself
    writes. What is left when it is over is done by ``Pace``, and its shards come a second time.
    """

    def __init__(self, plan: Plan, steps: Sequence[Collection[int]], walked: Collection[int]) -> None:
        self.steps = list(steps)
        self.stays = Stays(self.steps, KEPT_LAYERS)
        others = ((number, unit) for number, unit in enumerate(plan.units) if number not in walked)
        self._others = {number: shards_read(unit, plan.source.locations) for number, unit in others}

    def beside(self, step: int) -> set[int]:
        """The units that read nothing but what is here during a step."""
        held = self.stays.held(step)
        return {number for number, shards in self._others.items() if shards <= held}

    def left(self) -> list[int]:
        """The units that no step has everything for."""
        done: set[int] = set().union(*(self.beside(step) for step in range(len(self.steps))))
        return [number for number in self._others if number not in done]


class Streaming(NamedTuple):
    """What it takes to have the source shard by shard: shards and bytes that are fetched, and the most that lie here at once.

    ``twice`` are the shards that come more than once.
    """

    shards: int
    fetched_bytes: int
    spool_bytes: int
    ahead: int
    twice: tuple[str, ...]


def streaming_of(plan: Plan, ahead: int, walk: LayerPace | None = None) -> Streaming | None:
    """What a run of a plan fetches, with ``ahead`` shards on their way before they are read; None for a source that is here.

    Without a ``walk`` a plan that needs calibration is taken to be walked in the order of its layers' numbers.
    """
    if plan.source.snapshot is None:
        return None
    if walk is None and plan.needs_codes:
        walk = _walk_by_names(plan)
    # What the cache holds is read there.
    sizes = [0 if shard.path.exists() else shard.file_bytes for shard in plan.source.shards]
    last = Stays(Pace(plan, range(len(plan.units)) if walk is None else walk.left()).steps)
    phases = [last] if walk is None else [walk.stays, last]
    counts = Counter(stay.shard for stays in phases for stay in stays.stays if sizes[stay.shard])
    return Streaming(
        shards=len(counts),
        fetched_bytes=sum(stays.fetched_bytes(sizes) for stays in phases),
        spool_bytes=max(stays.peak_bytes(sizes, ahead) for stays in phases),
        ahead=ahead,
        twice=tuple(plan.source.shards[shard].path.name for shard, count in sorted(counts.items()) if count > 1),
    )


def shards_before_layers(source: Checkpoint, names: Iterable[str]) -> set[int]:
    """The shards to have for what a walk reads before its layers; of the others so little is read that ranges of bytes serve.

    The last norm is among these names, and its shard is the last that the walk comes to.
    """
    read: Counter[int] = Counter()
    places = dict(zip(source.specs, source.locations, strict=True))
    for name in names:
        read[places[name].shard] += source.specs[name].nbytes
    return {shard for shard, nbytes in read.items() if nbytes * _WORTH >= source.shards[shard].file_bytes}


def _walk_by_names(plan: Plan) -> LayerPace:
    """The walk that a calibration will make, as far as names tell; the model's own class knows it for certain."""
    model = describe_model(plan.source.specs)
    embeddings: list[str] = []
    layers: dict[str, dict[int, set[int]]] = {}
    for name, (shard, _) in zip(plan.source.specs, plan.source.locations, strict=True):
        found = _LAYER.match(name)
        if found is not None:
            layers.setdefault(found[1], {}).setdefault(int(found[2]), set()).add(shard)
        elif model.use(name).kind is Role.EMBEDDING:
            embeddings.append(name)
    # A vision tower has layers too, and fewer tensors.
    decoder = max(layers.values(), key=lambda own: sum(map(len, own.values())), default={})
    walked = {
        number
        for number, unit in enumerate(plan.units)
        if any((how := written_by(task.rewrite.detail)) is not None and how.is_calibrated for task in unit.tasks)
    }
    before = shards_before_layers(plan.source, embeddings)
    return LayerPace(plan, [before, *(shards for _, shards in sorted(decoder.items()))], walked)

"""The pieces of work that a layer is cut into: a batch watched, a sum, codes of some jobs, a batch of outputs.

Each reads files that all nodes see and writes files, or answers with little; none depends on who did another. What a batch
shows is kept as it was seen, and one piece of work takes each sum over all batches in their order: as one machine does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.calibrate.codes.layer import Job, Made, SharedFactors, do
from tensorsurgeon.calibrate.spread.desk import PutBack, StatesAt, WalkDesk, Watched, Written
from tensorsurgeon.calibrate.walk.crosses import Crosses
from tensorsurgeon.calibrate.walk.experts import ExpertRows, InputStatistics, fed_statistics
from tensorsurgeon.calibrate.walk.seeing import Seen
from tensorsurgeon.calibrate.walk.statistics import summed
from tensorsurgeon.machine.files import make_durable
from tensorsurgeon.quant.gptq.hessian import HessianAccumulator


class Fed(NamedTuple):
    """What a stack of experts got of a batch, written to its file: the first token, and the chosen experts [t, k]."""

    first_token: int
    chosen: np.ndarray
    written: Written


class Shown(NamedTuple):
    """What a batch showed.

    ``same``: by name, a number that inputs which are one and the same share; ``kept``: by name, which entry of ``inputs`` is
    its own. An entry has the inputs now and behind original layers, as tensors in the file ``path``.
    """

    path: Path
    same: dict[str, int]
    kept: dict[str, int]
    tokens: int
    crossed: bool
    fed: dict[str, Fed]
    fed_before: dict[str, Fed]
    outputs: Written | None
    original_outputs: Written | None


class Watch(NamedTuple):
    """Run one batch through the original layer, and keep what its linears and experts see."""

    layer: int
    batch: int
    watched: Watched
    inputs: StatesAt
    original: StatesAt | None
    outputs: StatesAt | None
    original_outputs: StatesAt | None
    experts: Mapping[str, StatesAt]
    experts_before: Mapping[str, StatesAt]
    path: Path

    def do(self, desk: WalkDesk) -> Shown:
        module, _, hooks = desk.stand(self.layer, watched=self.watched)
        assert hooks is not None
        outputs = None if self.outputs is None else self.outputs.open(to_write=True)
        after = None if self.original_outputs is None else self.original_outputs.open(to_write=True)
        before = None if self.original is None else self.original.open()
        found: list[Any] = []
        start = desk.walk.batches[self.batch][0]

        def original() -> None:
            assert before is not None
            made = desk.walk.call(self.layer, module, before, self.batch)
            if after is not None:
                after.write(start, made)

        def observe(batch: int, first_token: int, forward: Callable[[], Tensor]) -> Tensor:
            sighting = hooks.see(forward, None if before is None else original)
            found.append((sighting, first_token))
            return sighting.result

        with self.inputs.open() as inputs:
            desk.walk.run_batch(self.layer, module, inputs, outputs, self.batch, observe)
        (sighting, first_token), *_ = found
        same, kept, entries = _grouped(hooks.names, sighting.seen, sighting.before)
        _save(self.path, entries)
        copies = {name: max(1, stack.copies) for name, stack in hooks.stacks.items()}
        return Shown(
            self.path, same, kept, sighting.result.numel() // sighting.result.shape[-1], before is not None,
            {name: _fed(self.experts[name], first_token * copies[name], *sighting.chosen[name]) for name in sighting.chosen},
            {
                name: _fed(self.experts_before[name], first_token, *sighting.fed[name])
                for name in sighting.chosen if before is not None and name in self.experts_before
            },
            _closed(outputs), None if before is None else _closed(after),
        )  # fmt: skip


def _grouped(
    names: Sequence[str], seen: Mapping[str, Sequence[Seen]], before: Mapping[str, Sequence[Seen]]
) -> tuple[dict[str, int], dict[str, int], list[tuple[list[Tensor], list[Tensor]]]]:
    """Which names share an input, and each distinct one once."""
    same: dict[str, int] = {}
    kept: dict[str, int] = {}
    inputs: dict[tuple[Any, ...], int] = {}
    pairs: dict[tuple[Any, ...], int] = {}
    entries: list[tuple[list[Tensor], list[Tensor]]] = []
    for name in names:
        now, then = seen.get(name, ()), before.get(name, ())
        own = tuple(s.identity for s in now)
        both = (own, tuple(s.identity for s in then))
        same[name] = inputs.setdefault(own, len(inputs))
        if both not in pairs:
            pairs[both] = len(entries)
            entries.append(([_own(s.tensor) for s in now], [_own(s.tensor) for s in then]))
        kept[name] = pairs[both]
    return same, kept, entries


def _own(tensor: Tensor) -> Tensor:
    """Without the rest of what it is a view of, which would be saved with it."""
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.itemsize else tensor


def _save(path: Path, value: Any) -> None:
    """A value for other processes; they see all of it when this returns."""
    with open(path, "wb") as file:
        torch.save(value, file)
        file.flush()
        make_durable(file.fileno())


def _fed(at: StatesAt, first_token: int, hidden: Tensor, chosen: Tensor) -> Fed:
    with at.open(to_write=True, is_scratch=True) as states:
        states.write(first_token, hidden)
        return Fed(first_token, chosen.numpy(), Written.of(states))


def _closed(states: Any) -> Written | None:
    if states is None:
        return None
    with states:
        return Written.of(states)


class SumUp(NamedTuple):
    """Sum one input over all batches, in their order; ``entries`` says where it is in the file of each."""

    batches: Sequence[tuple[Path, int, int]]
    crossed: bool
    gathered: bool
    path: Path

    def do(self, desk: WalkDesk) -> Path:
        accumulator: HessianAccumulator | None = None
        crosses = Crosses()
        for path, entry, tokens in self.batches:
            now, before = torch.load(path, mmap=True, weights_only=True)[entry]
            for tensor in now:
                accumulator = accumulator or HessianAccumulator(tensor.shape[-1])
                accumulator.add(tensor)
            if self.crossed:
                crosses.add("", now, [] if self.gathered else before, tokens)
        found = None if accumulator is None else summed(accumulator, crosses.pop(""))
        _save(self.path, None if found is None else tuple(found))
        return self.path


class FedTo(NamedTuple):
    """An expert's input: which projection of which stack, and the tokens that it is fed."""

    stack: str
    expert: int
    first: bool
    tokens: np.ndarray


class Choose(NamedTuple):
    """Codes for some jobs that go by one key."""

    layer: int
    jobs: tuple[Job, ...]
    summed: Path | None
    fed: FedTo | None
    rows: Mapping[str, ExpertRows]
    rows_before: Mapping[str, ExpertRows]

    def do(self, desk: WalkDesk) -> list[Made]:
        linears = desk.by_layer[self.layer]
        shared = SharedFactors(_Statistics(self, desk), self.jobs, desk.options)
        return [do(job, linears, shared, desk.options, desk.original) for job in self.jobs]


class _Statistics:
    """Those of one key, read or computed."""

    def __init__(self, item: Choose, desk: WalkDesk) -> None:
        self._item, self._desk = item, desk

    def shared_key(self, key: str) -> str:
        """Keys are those of jobs already."""
        return key

    def of(self, key: str) -> InputStatistics | None:
        """The statistics of the item's only key."""
        item = self._item
        if item.fed is None:
            found = None if item.summed is None else torch.load(item.summed, weights_only=True)
            return None if found is None else InputStatistics(*found)
        name, expert, first, tokens = item.fed
        stack = next(stack for stack in self._desk.stand(item.layer).stacks if stack.name == name)
        made = fed_statistics(stack, expert, tokens, item.rows[name], item.rows_before.get(name), first=first)
        return made[0 if first else 1]


class Forward(NamedTuple):
    """Run one batch through the layer as it is, or with quantized weights, and write what it puts out."""

    layer: int
    batch: int
    inputs: StatesAt
    outputs: StatesAt
    codes: PutBack | None

    def do(self, desk: WalkDesk) -> Written:
        module = desk.stand(self.layer, codes=self.codes).module
        with self.inputs.open() as inputs, self.outputs.open(to_write=True) as outputs:
            desk.walk.run_batch(self.layer, module, inputs, outputs, self.batch)
            return Written.of(outputs)

"""Layers quantized by the nodes of a cluster; this machine cuts the work, keeps the order, and reads no weight but routers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tensorsurgeon.calibrate.announcing import announce
from tensorsurgeon.calibrate.codes.assembly import Assemblies
from tensorsurgeon.calibrate.codes.layer import jobs_of, put
from tensorsurgeon.calibrate.codes.linears import Linear, Part, keys_of, parts_of, schemes_of
from tensorsurgeon.calibrate.codes.originals import carries_original, passing
from tensorsurgeon.calibrate.codes.putting import write_codes
from tensorsurgeon.calibrate.codes.rules import NOT_REACHED
from tensorsurgeon.calibrate.codes.stage import Layer, Stage, layer_of
from tensorsurgeon.calibrate.codes.walked import WalkedLayers
from tensorsurgeon.calibrate.spread.desk import PutBack, StatesAt, Watched, Written
from tensorsurgeon.calibrate.spread.items import Forward, Shown, Watch
from tensorsurgeon.calibrate.spread.keys import SpreadKeys
from tensorsurgeon.calibrate.walk.experts import ExpertInputs, ExpertStatistics
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.stacks import ExpertStack, find_stacks
from tensorsurgeon.errors import Interrupted, JournalError
from tensorsurgeon.running.cluster.crew import Crew
from tensorsurgeon.running.cluster.member import Session

logger = logging.getLogger(__name__)

# Jobs that one piece of work does at most: their codes come back together.
_MOST_JOBS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadLayers:
    """``here`` does what one machine does: states before the first layer, and models whose layers hand on more than states."""

    here: WalkedLayers
    crew: Crew
    session: Session

    def first(self) -> Stage:
        return self.here.first()

    def resumed(self, layer: int, digest: str | None) -> Stage:
        return self.here.resumed(layer, digest)

    def quantize(self, stage: Stage, linears: Sequence[Linear], *, is_last: bool) -> Layer:
        if self.here.walk.may_pass_on:
            if stage.layer == 0:
                logger.warning("layers of this model hand on more than hidden states, so that this machine alone calibrates it")
            return self.here.quantize(stage, linears, is_last=is_last)
        inputs = stage.states
        folder = self.here.state.folder.absolute()
        if inputs is None:
            raise JournalError(
                f"nothing goes into layer {stage.layer}", where=str(folder), remedy="; start over with {overwrite}"
            )
        # Files are called by their layer: a node that was given up may still be writing those of an earlier one.
        for path in folder.glob("spread-*"):
            path.unlink()
        model, options = self.here.model, self.here.options
        # What follows from shapes and names is found without the weights.
        name, module = model.layer_names[stage.layer], model.layers[stage.layer]
        stacks = find_stacks(name, module)
        own = {stack.first_name: options.expert_hessian == "own" for stack in stacks}
        parts, without = parts_of(linears, model.traced(stage.layer), keys_of(name, module, stacks, own))
        if not self.here.walk.reaches(stage.layer):
            parts, without = [], dict.fromkeys(range(len(linears)), NOT_REACHED)
        outputs = None if is_last else self._states(self.here.state.states_path(stage.layer + 1))
        original = None
        if outputs is not None and self.here.asymmetric and carries_original(self.here.walk, options, stage, parts):
            original = self._states(self.here.state.original_path(stage.layer + 1))
        following = Stage(stage.layer + 1, outputs, original)
        made = Assemblies(linears, parts)
        if parts:
            with ExitStack() as scratch:
                used = [stack for stack in stacks if not {part.lines.name for part in parts}.isdisjoint(stack.parameters)]
                keys = self._watched(stage, following, used, parts, folder, scratch)
                announce(None, None, f"layer {stage.layer}: codes")
                self._choose(stage.layer, linears, parts, keys, made)
        if original is not None and stage.original is not None and not parts:
            self._forward(stage.layer, stage.original, original, None)
        if outputs is not None and (options.sequential or not parts):
            announce(None, None, f"layer {stage.layer}: its outputs")
            codes = None
            if parts:
                codes = PutBack(folder / f"spread-{stage.layer}-codes.pt", tuple(parts), schemes_of(linears, parts))
                write_codes(codes.path, made.quantized())
            self._forward(stage.layer, inputs, outputs, codes)
        for path in folder.glob("spread-*"):
            path.unlink()
        return layer_of(linears, made, without, following)

    def _states(self, path: Path) -> HiddenStates:
        return HiddenStates(path, self.here.walk.shape, self.here.model.dtype, create=True)

    def _run(self, items: Sequence[Any], take: Callable[[int, Any], None]) -> None:
        stop = self.here.stop
        self.crew.run(self.session, items, nbytes=[0] * len(items), stop=stop, take=take)
        if stop.is_set():
            raise Interrupted("stopped during calibration; finished layers are kept")

    def _watched(
        self,
        stage: Stage,
        following: Stage,
        used: Sequence[ExpertStack],
        parts: Sequence[Part],
        folder: Path,
        scratch: ExitStack,
    ) -> SpreadKeys:
        """Run the layer and sum what the linears of ``parts`` see; ``scratch`` lets go of what experts were fed."""
        announce(None, None, f"layer {stage.layer}: statistics")
        walk = self.here.walk
        assert stage.states is not None

        def room(prefix: str, stacks: Sequence[ExpertStack]) -> dict[str, ExpertInputs]:
            made = {}
            for k, stack in enumerate(stacks):
                tokens = walk.tokens.numel() * max(1, stack.copies)
                made[stack.name] = ExpertInputs(
                    folder / f"spread-{stage.layer}-{prefix}-{k}.bin", tokens, stack.hidden, self.here.model.dtype
                )
                scratch.callback(made[stack.name].close)
            return made

        fed = room("experts", used)
        before = room("experts-original", [s for s in used if not s.copies] if stage.original is not None else [])
        modules = frozenset(part.lines.name.rpartition(".")[0] for part in parts)
        watched = Watched(modules, frozenset(part.lines.name for part in parts))
        passed = passing(stage, following, self.here.options)
        now, original, outputs = StatesAt.of(stage.states), _where(stage.original), _where(passed)
        original_outputs = _where(following.original)
        rooms, rooms_before = ({name: StatesAt.of(one.states) for name, one in each.items()} for each in (fed, before))
        prefix = f"spread-{stage.layer}-batch"
        items = [
            Watch(
                stage.layer,
                batch,
                watched,
                now,
                original,
                outputs,
                original_outputs,
                rooms,
                rooms_before,
                folder / f"{prefix}-{batch}.pt",
            )
            for batch in range(len(walk.batches))
        ]
        shown: dict[int, Shown] = {}

        def take(batch: int, found: Shown) -> None:
            shown[batch] = found
            _note(passed, found.outputs)
            _note(following.original, found.original_outputs)
            for inputs, given in ((fed, found.fed), (before, found.fed_before)):
                for name, one in given.items():
                    inputs[name].note(one.first_token, one.written.shape, one.written.dtype, one.chosen)

        self._run(items, take)
        experts = {}
        for stack in used:
            experts[stack.name] = ExpertStatistics(stack, fed[stack.name], self.here.options, before.get(stack.name))
            experts[stack.name].choose(self._router(stage.layer, stack))
        keys = SpreadKeys([shown[batch] for batch in sorted(shown)], experts, fed, before)
        sums = keys.sums(folder, stage.layer)
        self._run(list(sums.values()), lambda number, path: keys.summed(list(sums)[number], path))
        return keys

    def _router(self, layer: int, stack: ExpertStack) -> Tensor | None:
        """The weight by whose logits cold experts are topped up."""
        if stack.router is None or self.here.options.experts != "balanced":
            return None
        model, read = self.here.model, self.here.walk.read
        found = model.parameter(layer, f"{model.layer_names[layer]}.{stack.router}.weight", read)
        if found is None:
            with model.layer(layer, read) as module:
                found = module.get_submodule(stack.router).get_parameter("weight").clone()
        return found

    def _choose(self, layer: int, linears: Sequence[Linear], parts: Sequence[Part], keys: SpreadKeys, made: Assemblies) -> None:
        slots = sum(member.slots for member in self.crew.members.values())
        jobs = jobs_of(linears, parts, keys, self.here.options)
        by_key: dict[str, list[int]] = {}
        for number, job in enumerate(jobs):
            by_key.setdefault(job.key, []).append(number)
        cut = []
        for numbers in by_key.values():
            each = min(_MOST_JOBS, -(-len(numbers) // (2 * slots)))
            cut += [numbers[start : start + each] for start in range(0, len(numbers), each)]
        # The longest first, so that nobody is left with one when the others are through.
        cut.sort(
            key=lambda numbers: (
                -sum((p.stop - p.start) * linears[p.linear].weight.shape[1] ** 2 for n in numbers for p in jobs[n].parts)
            )
        )
        items = [keys.item(layer, tuple(jobs[number] for number in numbers)) for numbers in cut]

        def take(number: int, found: list[Any]) -> None:
            for job, one in zip(items[number].jobs, found, strict=True):
                put(made, job, one)

        self._run(items, take)

    def _forward(self, layer: int, inputs: HiddenStates, outputs: HiddenStates, codes: PutBack | None) -> None:
        batches = range(len(self.here.walk.batches))
        items = [Forward(layer, batch, StatesAt.of(inputs), StatesAt.of(outputs), codes) for batch in batches]
        self._run(items, lambda _, written: _note(outputs, written))


def _where(states: HiddenStates | None) -> StatesAt | None:
    return None if states is None else StatesAt.of(states)


def _note(states: HiddenStates | None, written: Written | None) -> None:
    if states is not None and written is not None:
        states.note(written.shape, written.dtype, written.digests)

"""Layers quantized on the way through the model: statistics from one pass, the next layer's inputs from another."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tensorsurgeon.calibrate.announcing import announce
from tensorsurgeon.calibrate.codes.assembly import Assemblies
from tensorsurgeon.calibrate.codes.layer import quantize_on_cpu
from tensorsurgeon.calibrate.codes.linears import Linear, Part, ReadOriginal, keys_of, parts_of, schemes_of, stored_turned
from tensorsurgeon.calibrate.codes.originals import carries_original, observing, passing
from tensorsurgeon.calibrate.codes.putting import put_back
from tensorsurgeon.calibrate.codes.resuming import resumed
from tensorsurgeon.calibrate.codes.rules import NOT_REACHED, TUNED
from tensorsurgeon.calibrate.codes.stage import Layer, Stage, layer_of
from tensorsurgeon.calibrate.codes.tuned import Tuner
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.state import CalibrationState
from tensorsurgeon.calibrate.walk.experts import ExpertInputs, ExpertStatistics, InputStatistics
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.calibrate.walk.stacks import ExpertStack, find_stacks
from tensorsurgeon.calibrate.walk.statistics import LayerObserver, write_layer
from tensorsurgeon.calibrate.walk.walk import Walk
from tensorsurgeon.calibrate.walk.workers import Turns
from tensorsurgeon.errors import JournalError


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkedLayers:
    """The walk, and where its states lie between layers.

    ``asymmetric``: what original layers put out is carried beside what quantized ones do, from the first quantized layer on.
    """

    model: StreamedModel
    original: ReadOriginal
    options: CalibrationOptions
    walk: Walk
    state: CalibrationState
    workers: int
    stop: threading.Event
    asymmetric: bool = False
    max_ram_bytes: int | None = None

    @property
    def _tuner(self) -> Tuner:
        return Tuner(
            walk=self.walk, options=self.options, original=self.original, workers=self.workers, stop=self.stop,
            max_ram_bytes=self.max_ram_bytes,
        )  # fmt: skip

    def first(self) -> Stage:
        states = self._states(0, create=True)
        self.walk.embed(states.write)
        return Stage(0, states)

    def resumed(self, layer: int, digest: str | None) -> Stage:
        return resumed(layer, digest, self.state, self.walk, lambda path: self._open(path, create=False))

    @contextmanager
    def _standing(self, layer: int, is_last: bool) -> Iterator[nn.Module]:
        """The layer with its weights."""
        with self.model.layer(layer, self.walk.read) as module:
            yield module

    def _states(self, layer: int, *, create: bool) -> HiddenStates:
        return self._open(self.state.states_path(layer), create=create)

    def _open(self, path: Path, *, create: bool) -> HiddenStates:
        return HiddenStates(path, self.walk.shape, self.model.dtype, create=create)

    def quantize(self, stage: Stage, linears: Sequence[Linear], *, is_last: bool) -> Layer:
        inputs = stage.states
        if inputs is None:
            raise JournalError(
                f"nothing goes into layer {stage.layer}",
                where=str(self.state.folder),
                remedy="; start over with {overwrite}",
            )
        with self._standing(stage.layer, is_last) as module, ExitStack() as held:
            outputs = None if is_last else self._states(stage.layer + 1, create=True)
            name = self.model.layer_names[stage.layer]
            stacks = find_stacks(name, module)
            own = {stack.first_name: self.options.expert_hessian == "own" for stack in stacks}
            parts, without = parts_of(linears, self.model.traced(stage.layer), keys_of(name, module, stacks, own))
            if not self.walk.reaches(stage.layer):
                parts, without = [], dict.fromkeys(range(len(linears)), NOT_REACHED)
            original = None
            if outputs is not None and self.asymmetric and carries_original(self.walk, self.options, stage, parts):
                original = self._open(self.state.original_path(stage.layer + 1), create=True)
            tuned = any(linears[part.linear].method == TUNED for part in parts)
            following = Stage(stage.layer + 1, outputs, original)
            targets = original
            if tuned and targets is None:
                targets = held.enter_context(self._open(self.state.targets_path, create=True))
            made = self._quantized(stage, module, following, linears, parts, stacks, targets if original is None else None)
            if original is not None and stage.original is not None and not parts:
                self._run(stage.layer, module, stage.original, original)
            if targets is not None and tuned:
                self._tuner.tune(stage.layer, module, inputs, targets, linears, parts, made)
            if outputs is not None and (self.options.sequential or not parts):
                announce(None, None, f"layer {stage.layer}: its outputs")
                self.model.keep_shared(stage.layer)
                self._run(stage.layer, module, inputs, outputs)
            following = replace(following, handed=self.walk.handed(stage.layer + 1))
            return layer_of(linears, made, without, following)

    def _quantized(
        self,
        stage: Stage,
        module: nn.Module,
        following: Stage,
        linears: Sequence[Linear],
        parts: Sequence[Part],
        stacks: Sequence[ExpertStack],
        targets: HiddenStates | None,
    ) -> Assemblies:
        """Statistics from one pass over the layer's inputs, and codes; the original layer's outputs where those are wanted."""
        keep = self.options.write_statistics if linears else None
        used: dict[str, InputStatistics] = {}
        aliases: dict[str, str] = {}
        made = Assemblies(linears, parts)
        if parts:
            with ExitStack() as scratch:
                announce(None, None, f"layer {stage.layer}: statistics")
                statistics = self._watched(stage, module, following, stacks, parts, scratch, targets)
                announce(None, None, f"layer {stage.layer}: codes")
                # What comes next is run with the weights that a reader of the output will have.
                replaces = self.options.sequential and following.states is not None
                replaces = replaces or any(linears[part.linear].method == TUNED for part in parts)
                made = self._codes(linears, parts, statistics, None if keep is None else used, replaces)
                aliases = {part.key: statistics.shared_key(part.key) for part in parts}
        if keep is not None:
            write_layer(keep, stage.layer, used, aliases, crossed=self.asymmetric)
        return made

    def _watched(
        self,
        stage: Stage,
        module: nn.Module,
        following: Stage,
        stacks: Sequence[ExpertStack],
        parts: Sequence[Part],
        scratch: ExitStack,
        targets: HiddenStates | None,
    ) -> Any:
        """Run the layer and sum what the linears of ``parts`` see; ``scratch`` lets go of what experts were fed."""
        number, inputs = stage.layer, stage.states
        assert inputs is not None
        wanted = {part.lines.name.rpartition(".")[0] for part in parts}
        name = self.model.layer_names[number]
        linears = {
            f"{name}.{n}": m for n, m in module.named_modules() if f"{name}.{n}" in wanted and stored_turned(m) is not None
        }
        parameters = {part.lines.name for part in parts}
        used = [stack for stack in stacks if not parameters.isdisjoint(stack.parameters)]

        def room(prefix: str, stacks: Sequence[ExpertStack]) -> dict[str, ExpertInputs]:
            made = {}
            for k, stack in enumerate(stacks):
                tokens = self.walk.tokens.numel() * max(1, stack.copies)
                made[stack.name] = self._inputs(self.state.folder / f"{prefix}-{k}.bin", tokens, stack)
                scratch.callback(made[stack.name].close)
            return made

        fed = room("experts", used)
        # Rows that are gathered by the router's choice are not of the same tokens behind other layers.
        originals = room("experts-original", [s for s in used if not s.copies] if stage.original is not None else [])
        turns = Turns()
        observer = self._observer(linears, used, fed, turns, originals)
        with observer.watching():
            observe = observing(self.walk, stage, module, following.original, observer, targets)
            self._run(number, module, inputs, passing(stage, following, self.options), observer=observe, turns=turns)
        routers = {s.name: None if s.router is None else module.get_submodule(s.router)._parameters["weight"] for s in used}
        return self._statistics(observer, used, fed, originals, routers)

    def _run(self, number: int, module: nn.Module, inputs: HiddenStates, outputs: HiddenStates | None, **observing: Any) -> None:
        self.walk.run_layer(number, module, inputs, outputs, workers=self.workers, stop=self.stop, **observing)

    # What is done elsewhere on a card.

    def _codes(
        self,
        linears: Sequence[Linear],
        parts: Sequence[Part],
        statistics: Any,
        used: dict[str, InputStatistics] | None,
        replaces: bool,
    ) -> Assemblies:
        """Codes by what ``_statistics`` made; with ``replaces`` the layer's weights are then what a reader will have."""
        made = quantize_on_cpu(
            linears, parts, statistics, self.options, self.original, workers=self.workers, stop=self.stop, used=used
        )
        if replaces:
            schemes = schemes_of(linears, parts)
            put_back(self.model.model, parts, schemes, made.quantized(), workers=self.workers, stop=self.stop)
        return made

    def _inputs(self, path: Path, tokens: int, stack: ExpertStack) -> Any:
        """Room for what a stack of experts is fed."""
        return ExpertInputs(path, tokens, stack.hidden, self.model.dtype)

    def _observer(
        self,
        linears: Mapping[str, nn.Module],
        stacks: Sequence[ExpertStack],
        fed: Mapping[str, Any],
        turns: Turns,
        originals: Mapping[str, Any],
    ) -> LayerObserver:
        return LayerObserver(linears, stacks, fed, turns, originals=originals)

    def _statistics(
        self,
        observer: LayerObserver,
        stacks: Sequence[ExpertStack],
        fed: Mapping[str, Any],
        originals: Mapping[str, Any],
        routers: Mapping[str, Tensor | None],
    ) -> Any:
        experts = {}
        for stack in stacks:
            experts[stack.name] = ExpertStatistics(stack, fed[stack.name], self.options, originals.get(stack.name))
            experts[stack.name].choose(routers[stack.name])
        return observer.result(experts)

"""Layers quantized on the card: the walk, the sums and the codes never leave it but as files."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tensorsurgeon.calibrate.card.budget import CardPlan
from tensorsurgeon.calibrate.card.experts import CardExperts, CardInputs
from tensorsurgeon.calibrate.card.quantize import CardQuantizer
from tensorsurgeon.calibrate.card.states import CardStates
from tensorsurgeon.calibrate.card.sums import CardCross, CardSum
from tensorsurgeon.calibrate.card.weights import WeightsAhead
from tensorsurgeon.calibrate.codes.assembly import Assemblies
from tensorsurgeon.calibrate.codes.linears import Linear, Part, ReadOriginal, keys_of, parts_of, stored_turned
from tensorsurgeon.calibrate.codes.originals import carries_original, observing, passing
from tensorsurgeon.calibrate.codes.resuming import resumed
from tensorsurgeon.calibrate.codes.rules import NOT_REACHED, TUNED
from tensorsurgeon.calibrate.codes.stage import Layer, Stage, layer_of
from tensorsurgeon.calibrate.codes.tuned import Tuner
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.state import CalibrationState
from tensorsurgeon.calibrate.walk.crosses import Crosses
from tensorsurgeon.calibrate.walk.experts import InputStatistics
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.calibrate.walk.stacks import ExpertStack, find_stacks
from tensorsurgeon.calibrate.walk.statistics import LayerObserver, write_layer
from tensorsurgeon.calibrate.walk.walk import Observer, Walk
from tensorsurgeon.calibrate.walk.workers import Turns
from tensorsurgeon.errors import JournalError


@dataclass(frozen=True, slots=True, kw_only=True)
class CardLayers:
    """As ``codes.walked.WalkedLayers``, by one thread; ``weights`` reads a layer ahead and ``plan`` says what lies where."""

    model: StreamedModel
    original: ReadOriginal
    options: CalibrationOptions
    walk: Walk
    state: CalibrationState
    weights: WeightsAhead
    plan: CardPlan
    device: torch.device
    stop: threading.Event
    asymmetric: bool = False

    def first(self) -> Stage:
        states = self._states(0, create=True)
        self.walk.embed(states.write)
        return Stage(0, states)

    def resumed(self, layer: int, digest: str | None) -> Stage:
        return resumed(layer, digest, self.state, self.walk, lambda path: self._open(path, create=False))

    def _states(self, layer: int, *, create: bool) -> HiddenStates:
        return self._open(self.state.states_path(layer), create=create)

    def _open(self, path: Path, *, create: bool) -> HiddenStates:
        if self.plan.states == "disk":
            return HiddenStates(path, self.walk.shape, self.model.dtype, create=create)
        return CardStates(
            path, self.walk.shape, self.model.dtype, create=create, device=self.device, place=self.plan.states
        )  # fmt: skip

    def quantize(self, stage: Stage, linears: Sequence[Linear], *, is_last: bool) -> Layer:
        inputs = stage.states
        if inputs is None:
            raise JournalError(
                f"nothing goes into layer {stage.layer}",
                where=str(self.state.folder),
                remedy="; start over with {overwrite}",
            )
        with self.model.layer(stage.layer, self.weights.tensor) as module, torch.no_grad(), ExitStack() as held:
            self.weights.settle()
            if not is_last:
                self.weights.start(self.model.source_names(stage.layer + 1))
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
                tuner = Tuner(walk=self.walk, options=self.options, original=self.original, workers=1, stop=self.stop)
                tuner.tune(stage.layer, module, inputs, targets, linears, parts, made)
            if outputs is not None and (self.options.sequential or not parts):
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
        """Statistics from one pass over the layer's inputs, and codes; the weights as a reader of the output has them."""
        keep = self.options.write_statistics if linears else None
        used: dict[str, InputStatistics] = {}
        aliases: dict[str, str] = {}
        made = Assemblies(linears, parts)
        if parts:
            with ExitStack() as scratch:
                statistics = self._watched(stage, module, following, stacks, parts, scratch, targets)
                quantizer = CardQuantizer(
                    linears=linears, statistics=statistics, options=self.options, model=self.model, original=self.original,
                    device=self.device,
                )  # fmt: skip
                put_back = self.options.sequential and following.states is not None
                put_back = put_back or any(linears[part.linear].method == TUNED for part in parts)
                made = quantizer.run(parts, put_back=put_back, used=None if keep is None else used)
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
    ) -> WatchedOnCard:
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

        def room(prefix: str, stacks: Sequence[ExpertStack]) -> dict[str, CardInputs]:
            made = {}
            for k, stack in enumerate(stacks):
                path, tokens = self.state.folder / f"{prefix}-{k}.bin", self.walk.tokens.numel() * max(1, stack.copies)
                made[stack.name] = CardInputs(
                    path, tokens, stack.hidden, self.model.dtype, device=self.device, place=self.plan.inputs
                )  # fmt: skip
                scratch.callback(made[stack.name].close)
            return made

        fed = room("experts", used)
        # Rows that are gathered by the router's choice are not of the same tokens behind other layers.
        originals = room("experts-original", [s for s in used if not s.copies] if stage.original is not None else [])
        observer = LayerObserver(
            linears, used, fed, Turns(), lambda features: CardSum(features, self.device), originals=originals,
            crosses=Crosses(lambda features: CardCross(features, self.device)),
        )  # fmt: skip
        with observer.watching():
            observe = observing(self.walk, stage, module, following.original, observer, targets)
            self._run(number, module, inputs, passing(stage, following, self.options), observe)
        experts = {}
        for stack in used:
            router = None if stack.router is None else module.get_submodule(stack.router)._parameters["weight"]
            experts[stack.name] = CardExperts(stack, fed[stack.name], self.options, router, originals.get(stack.name))
        return WatchedOnCard(self.device, *observer.observed(), experts)

    def _run(
        self,
        number: int,
        module: nn.Module,
        inputs: HiddenStates,
        outputs: HiddenStates | None,
        observer: Observer | None = None,
    ) -> None:
        self.walk.run_layer(number, module, inputs, outputs, workers=1, stop=self.stop, observer=observer)


@dataclass(frozen=True, slots=True)
class WatchedOnCard:
    """Statistics of one layer, fresh from the walk; those of experts are computed when asked for."""

    device: torch.device
    sums: Mapping[str, InputStatistics]
    leader: Mapping[str, str]
    experts: Mapping[str, CardExperts]

    def shared_key(self, key: str) -> str:
        """The key under which a shared input is kept."""
        return self.leader.get(key, key)

    def _expert_of(self, key: str) -> tuple[CardExperts, int, bool] | None:
        """The stack, the number and whether it is the first projection, for the key of one expert."""
        parameter, _, expert = key.rpartition(".")
        known = (e for e in self.experts.values() if parameter in (e.stack.first_name, e.stack.down_name))
        found = next(known, None) if expert.isdecimal() else None
        return None if found is None else (found, int(expert), parameter != found.stack.down_name)

    def is_early(self, key: str) -> bool:
        """Down projections' inputs are made with the first projections' original weights."""
        found = self._expert_of(key)
        return found is not None and not found[2]

    def stack(self, keys: Sequence[str], columns: int) -> tuple[Tensor, list[int], Tensor | None]:
        """Hessians F32 [len(keys), columns, columns], tokens, and cross products beside Hessians where some are carried."""
        experts = [self._expert_of(key) for key in keys]
        first = experts[0]
        if first is not None and all(e is not None and e[0] is first[0] and e[2] == first[2] for e in experts):
            stack, numbers = first[0], [e[1] for e in experts if e is not None]
            hessian, cross = stack.sums(numbers, first=first[2])
            return hessian, [stack.tokens_of(number) for number in numbers], cross
        if len(keys) > 1:
            each = [self.stack([key], columns) for key in keys]
            crosses = [torch.zeros_like(hessian) if cross is None else cross for hessian, _, cross in each]
            crossed = any(cross is not None for _, _, cross in each)
            counts = [count for _, counts, _ in each for count in counts]
            return torch.cat([hessian for hessian, _, _ in each]), counts, torch.cat(crosses) if crossed else None
        found = self.sums.get(self.shared_key(keys[0]))
        if found is None:
            return torch.zeros(1, columns, columns, device=self.device), [0], None
        return found.hessian[None], [found.tokens], None if found.cross is None else found.cross[None]

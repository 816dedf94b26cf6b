"""Layers quantized on the card: the walk, the sums and the codes never leave it but as files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorsurgeon.calibrate.card.budget import CardPlan
from tensorsurgeon.calibrate.card.experts import CardExperts, CardInputs
from tensorsurgeon.calibrate.card.quantize import CardQuantizer
from tensorsurgeon.calibrate.card.states import CardStates
from tensorsurgeon.calibrate.card.sums import CardCross, CardSum
from tensorsurgeon.calibrate.card.weights import WeightsAhead
from tensorsurgeon.calibrate.codes.assembly import Assemblies
from tensorsurgeon.calibrate.codes.linears import Linear, Part
from tensorsurgeon.calibrate.codes.walked import WalkedLayers
from tensorsurgeon.calibrate.walk.crosses import Crosses
from tensorsurgeon.calibrate.walk.experts import InputStatistics
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.stacks import ExpertStack
from tensorsurgeon.calibrate.walk.statistics import LayerObserver
from tensorsurgeon.calibrate.walk.workers import Turns


@dataclass(frozen=True, slots=True, kw_only=True)
class CardLayers(WalkedLayers):
    """The walk by one thread on a card; ``weights`` reads a layer ahead and ``plan`` says what lies where."""

    weights: WeightsAhead
    plan: CardPlan
    device: torch.device
    workers: int = 1

    @contextmanager
    def _standing(self, layer: int, is_last: bool) -> Iterator[nn.Module]:
        with self.model.layer(layer, self.weights.tensor) as module, torch.no_grad():
            self.weights.settle()
            if not is_last:
                self.weights.start(self.model.source_names(layer + 1))
            yield module

    def _open(self, path: Path, *, create: bool) -> HiddenStates:
        if self.plan.states == "disk":
            return HiddenStates(path, self.walk.shape, self.model.dtype, create=create)
        return CardStates(
            path, self.walk.shape, self.model.dtype, create=create, device=self.device, place=self.plan.states
        )  # fmt: skip

    def _codes(
        self,
        linears: Sequence[Linear],
        parts: Sequence[Part],
        statistics: Any,
        used: dict[str, InputStatistics] | None,
        replaces: bool,
    ) -> Assemblies:
        quantizer = CardQuantizer(
            linears=linears, statistics=statistics, options=self.options, model=self.model, original=self.original,
            device=self.device,
        )  # fmt: skip
        return quantizer.run(parts, put_back=replaces, used=used)

    def _inputs(self, path: Path, tokens: int, stack: ExpertStack) -> CardInputs:
        return CardInputs(
            path, tokens, stack.hidden, self.model.dtype, device=self.device, place=self.plan.inputs
        )  # fmt: skip

    def _observer(
        self,
        linears: Mapping[str, nn.Module],
        stacks: Sequence[ExpertStack],
        fed: Mapping[str, Any],
        turns: Turns,
        originals: Mapping[str, Any],
    ) -> LayerObserver:
        return LayerObserver(
            linears, stacks, fed, turns, lambda features: CardSum(features, self.device), originals=originals,
            crosses=Crosses(lambda features: CardCross(features, self.device)),
        )  # fmt: skip

    def _statistics(
        self,
        observer: LayerObserver,
        stacks: Sequence[ExpertStack],
        fed: Mapping[str, Any],
        originals: Mapping[str, Any],
        routers: Mapping[str, Tensor | None],
    ) -> WatchedOnCard:
        experts = {
            stack.name: CardExperts(stack, fed[stack.name], self.options, routers[stack.name], originals.get(stack.name))
            for stack in stacks
        }
        return WatchedOnCard(self.device, *observer.observed(), experts)


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

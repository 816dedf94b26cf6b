"""What a node holds of a calibrated run: the model, and the layer that is worked on, for all threads together."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from tensorsurgeon.calibrate.codes.linears import Linear, Part, stored_turned
from tensorsurgeon.calibrate.codes.putting import put_back, read_codes
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.model import StreamedModel, read_weights
from tensorsurgeon.calibrate.walk.seeing import Hooks
from tensorsurgeon.calibrate.walk.stacks import ExpertStack, find_stacks
from tensorsurgeon.calibrate.walk.walk import Walk
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.machine.limits import usable_cores
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.quant.scheme import Scheme


class StatesAt(NamedTuple):
    """Hidden states in a file that all nodes see."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, states: HiddenStates) -> StatesAt:
        """Where these lie."""
        return cls(states.path.absolute(), states.shape, states.dtype)

    def open(self, *, to_write: bool = False, is_scratch: bool = False) -> HiddenStates:
        """The file, opened in this process; what is written becomes durable by ``sync`` alone."""
        return HiddenStates(self.path, self.shape, self.dtype, create=False, is_scratch=is_scratch, joins=to_write)


class Written(NamedTuple):
    """What a node wrote of states: the shape of a sample, the dtype, and a digest of each sample."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    digests: dict[int, str]

    @classmethod
    def of(cls, states: HiddenStates) -> Written:
        """All that was written through these, durable when this returns."""
        states.sync()
        return cls(states.shape[1:], states.dtype, states.written)


@dataclass(frozen=True, slots=True)
class WalkJob:
    """What nodes need of a calibrated run; ``by_layer`` are the linears that are quantized."""

    plan: Plan
    options: CalibrationOptions
    tokens: np.ndarray
    by_layer: Mapping[int, Sequence[Linear]]

    def open(self) -> WalkDesk:
        """The model without its weights, and what layers are called with, learnt anew from the first batch."""
        return WalkDesk(self)


class Item(Protocol):
    """A piece of work at a desk."""

    def do(self, desk: WalkDesk) -> Any:
        """The result."""
        ...


class Watched(NamedTuple):
    """Whose inputs are noted while batches go through: linears by full name, and parameters of stacks."""

    modules: frozenset[str]
    parameters: frozenset[str]


class PutBack(NamedTuple):
    """Codes by linear in a file, their schemes, and the parts of the layer that they replace."""

    path: Path
    parts: tuple[Part, ...]
    schemes: Mapping[int, Scheme]


class Standing(NamedTuple):
    """A layer with its weights; ``hooks`` where it is watched."""

    module: nn.Module
    stacks: list[ExpertStack]
    hooks: Hooks | None


class WalkDesk:
    """One per node and run. What is worked on at once is of one layer in one state: nobody waits for another."""

    def __init__(self, job: WalkJob) -> None:
        # Of this thread, as for each that does an item: a product before it would be split over the whole machine.
        torch.set_num_threads(1)
        self._held = ExitStack()
        self.plan, self.options, self.by_layer = job.plan, job.options, job.by_layer
        self.source = self._held.enter_context(Source(job.plan.source))
        self.model = StreamedModel(job.plan.source)
        folder = self._held.enter_context(tempfile.TemporaryDirectory(prefix="surgeon-walk-"))
        self.walk = Walk(self.model, read_weights(self.model.weights.reader(self.source)), job.tokens, folder=Path(folder))
        self.walk.embed(None)
        self._changing = threading.Lock()
        self._layer, self._watching = ExitStack(), ExitStack()
        self._state: tuple[int, Path | None, Watched | None] | None = None
        self._standing: Standing | None = None

    def do(self, item: Item) -> Any:
        """Any thread."""
        torch.set_num_threads(1)
        with torch.no_grad():
            return item.do(self)

    def original(self, linear: Linear) -> np.ndarray:
        """A weight as it is before it is quantized."""
        return linear.read(self.plan, self.source)

    def stand(self, layer: int, *, watched: Watched | None = None, codes: PutBack | None = None) -> Standing:
        """The layer with its weights, original ones or those of ``codes``; whoever comes first changes what is there."""
        wanted = (layer, None if codes is None else codes.path, watched)
        with self._changing:
            if self._standing is None or self._state != wanted:
                self._standing = self._change(layer, watched, codes)
                self._state = wanted
            return self._standing

    def _change(self, layer: int, watched: Watched | None, codes: PutBack | None) -> Standing:
        known, standing = self._state, self._standing
        self._state = self._standing = None
        if standing is None or known is None or known[0] != layer or known[1] is not None:
            self._watching.close()
            self._layer.close()
            module = self._layer.enter_context(self.model.layer(layer, self.walk.read))
            standing = Standing(module, find_stacks(self.model.layer_names[layer], module), None)
        self._watching.close()
        if codes is not None:
            stop = threading.Event()
            found = read_codes(codes.path, codes.schemes)
            put_back(self.model.model, codes.parts, codes.schemes, found, workers=usable_cores(), stop=stop)
        return standing._replace(hooks=None if watched is None else self._hooks(layer, standing, watched))

    def _hooks(self, layer: int, standing: Standing, watched: Watched) -> Hooks:
        name = self.model.layer_names[layer]
        linears = {f"{name}.{n}": m for n, m in standing.module.named_modules() if f"{name}.{n}" in watched.modules}
        linears = {full: module for full, module in linears.items() if stored_turned(module) is not None}
        hooks = Hooks(linears, [stack for stack in standing.stacks if not watched.parameters.isdisjoint(stack.parameters)])
        self._watching.enter_context(hooks.watching())
        return hooks

    def close(self) -> None:
        """Let go of the layer, the files and the folder."""
        self._watching.close()
        self._layer.close()
        self._held.close()

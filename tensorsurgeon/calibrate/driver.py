"""The layers of a calibrated run one after another, in the place of the executor."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tensorsurgeon.calibrate.announcing import announce
from tensorsurgeon.calibrate.card.budget import BATCH_TOKENS, CardPlan
from tensorsurgeon.calibrate.card.layers import CardLayers
from tensorsurgeon.calibrate.card.weights import WeightsAhead
from tensorsurgeon.calibrate.codes.linears import Linear, linears_by_layer
from tensorsurgeon.calibrate.codes.originals import is_asymmetric
from tensorsurgeon.calibrate.codes.stage import Layer, Layers, Stage
from tensorsurgeon.calibrate.codes.stored import StoredLayers
from tensorsurgeon.calibrate.codes.walked import WalkedLayers
from tensorsurgeon.calibrate.data.data import CalibrationData
from tensorsurgeon.calibrate.layer_shards import LayerShards
from tensorsurgeon.calibrate.log import LOG_NAME, LogRow, log_bytes, rounded_row, summarize
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.spread.desk import WalkJob
from tensorsurgeon.calibrate.spread.layers import SpreadLayers
from tensorsurgeon.calibrate.state import CalibrationState, Reached
from tensorsurgeon.calibrate.walk.allocator import give_back_memory
from tensorsurgeon.calibrate.walk.model import StreamedModel, read_weights
from tensorsurgeon.calibrate.walk.walk import Walk
from tensorsurgeon.checkpoint.sink import Sink, publish_bytes
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.errors import JournalError, PlanViolationError, RecipeError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.quant.scheme import Quantized
from tensorsurgeon.running.cluster.units import absolute
from tensorsurgeon.running.executor import Progress, run_units
from tensorsurgeon.running.journal import Journal, state_folder
from tensorsurgeon.running.machines import HERE, Machines

logger = logging.getLogger(__name__)


class Codes:
    """Codes by module, None for one that is rounded to nearest by decision."""

    def __init__(self, by_module: Mapping[str, Quantized | None]) -> None:
        self.by_module = by_module

    def quantized(self, module: str, start: int, stop: int) -> Quantized | None:
        """Rows of the codes of a module; PlanViolationError for one that nothing was decided about."""
        if module not in self.by_module:
            raise PlanViolationError(f"{module}: is written before its layer was calibrated")
        found = self.by_module[module]
        if found is None or stop - start == len(found.codes):
            return found
        rows = slice(start, stop)
        zero_point = None if found.zero_point is None else found.zero_point[rows]
        # Of a block of rows the first is at a multiple of its height.
        all_rows, all_scales = len(found.codes), len(found.scale)
        last = all_scales if stop == all_rows else stop * all_scales // all_rows
        scale = found.scale[start * all_scales // all_rows : last]
        return Quantized(found.codes[rows], scale, zero_point, found.global_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """Takes the place of the executor in ``run_plan``: layer by layer first, then all that is left."""

    model: StreamedModel
    data: CalibrationData | None
    options: CalibrationOptions
    linears: Sequence[Linear]
    target: Path
    card: CardPlan | None
    ahead: int
    machines: Machines = HERE

    def execute(
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
        progress: Callable[[Progress], None],
    ) -> dict[int, list[str]]:
        """Run every unit that is not done, as ``run_units`` does, and write the log."""
        by_layer = linears_by_layer(self.linears, len(self.model.layers))
        state = CalibrationState(state_folder(self.target), plan.fingerprint, self.options.write_statistics)
        shards = LayerShards(plan, source, self.model, by_layer, self.ahead)
        left = [linear for linear in self.linears if linear.layer is None]
        outside = dict.fromkeys((linear.module for linear in left), None)

        def write(
            units: set[int] | None, codes: Mapping[str, Quantized | None], digests: dict[int, list[str]]
        ) -> dict[int, list[str]]:
            if units is not None and not units:
                return digests
            # Codes of a layer are here: to send them would cost more than to write them.
            run = self.machines.run_units if units is None else run_units
            return run(
                plan, source, sink, journal, done=digests, workers=workers, max_ram_bytes=max_ram_bytes, stop=stop,
                progress=progress, only=None if units is None else sorted(units), codes=Codes(codes),
            )  # fmt: skip

        def finish(number: int, began: float, made: Layer, before: _Finished) -> _Finished:
            """Everything that has to last before a layer counts as done, in this order."""
            made.next.sync()
            units = {unit for linear in by_layer.get(number, []) for unit in linear.units}
            units |= shards.beside(number, before.digests)
            digests = write(units, {**made.codes, **outside}, before.digests)
            shards.passed(number)
            reached = state.advance(before.reached, made.rows, made.next.digest)
            _report(number, len(self.model.layers), made.rows, time.monotonic() - began)
            # Whoever still holds the result must not hold a layer of codes while the next one is made.
            made.codes.clear()
            return _Finished(digests, reached)

        last = max(by_layer, default=-1)
        with ExitStack() as held:
            layers = self._layers(plan, source, state, workers, max_ram_bytes, stop, held)
            reached, stage = _begin(state, layers, shards, by_layer, done)
            done = write(shards.before_layers(done), outside, done)
            shards.begun()
            held.callback(stage.close)
            finished = _done(_Finished(dict(done), reached))
            with _finishing(behind=self.card is not None) as submit:
                while stage.layer <= last:
                    began = time.monotonic()
                    announce(stage.layer, last + 1, f"layer {stage.layer} of 0 to {last}")
                    # Before each layer: what the one before it held is free by now.
                    give_back_memory()
                    made = layers.quantize(stage, by_layer.get(stage.layer, []), is_last=stage.layer == last)
                    before = finished.result()
                    stage.close()
                    held.callback(made.next.close)
                    finished = submit(finish, stage.layer, began, made, before)
                    stage = made.next
                digests, _ = finished.result()
        announce(last + 1, last + 1, "writing the rest")
        digests = write(None, outside, digests)
        rows = [row for number in sorted(by_layer) for row in state.rows(number)]
        rows += [rounded_row(None, linear.module, linear.reason) for linear in left]
        publish_bytes(self.target / LOG_NAME, log_bytes(rows))
        return digests

    def _layers(
        self,
        plan: Plan,
        source: Source,
        state: CalibrationState,
        workers: int,
        max_ram_bytes: int,
        stop: threading.Event,
        held: ExitStack,
    ) -> Layers:
        def original(linear: Linear) -> np.ndarray:
            return linear.read(plan, source)

        reader = self.model.weights.reader(source)
        if self.data is None:
            if self.options.read_statistics is None:
                raise RecipeError("calibration needs data or statistics")
            return StoredLayers(
                model=self.model, original=original, options=self.options, folder=self.options.read_statistics, workers=workers,
                stop=stop,
            )  # fmt: skip
        if self.card is not None:
            device = self.model.device
            weights = held.enter_context(WeightsAhead(reader, device))
            walk = Walk(self.model, weights.tensor, self.data.tokens, BATCH_TOKENS, folder=state.folder)
            return CardLayers(
                model=self.model, original=original, options=self.options, walk=walk, state=state, weights=weights,
                plan=self.card, device=device, stop=stop, asymmetric=is_asymmetric(self.linears, self.options),
            )  # fmt: skip
        walk = Walk(self.model, read_weights(reader), self.data.tokens, folder=state.folder)
        here = WalkedLayers(
            model=self.model, original=original, options=self.options, walk=walk, state=state, workers=workers, stop=stop,
            asymmetric=is_asymmetric(self.linears, self.options), max_ram_bytes=max_ram_bytes,
        )  # fmt: skip
        crew = self.machines.crew
        if crew is None:
            return here
        by_layer = linears_by_layer(self.linears, len(self.model.layers))
        job = WalkJob(replace(plan, source=absolute(plan.source)), self.options, self.data.tokens, by_layer)
        return SpreadLayers(here=here, crew=crew, session=held.enter_context(crew.session(job)))


class _Finished(NamedTuple):
    """Digests of the units that are done, and how far the run has come."""

    digests: dict[int, list[str]]
    reached: Reached


def _done(value: _Finished) -> Future[_Finished]:
    future: Future[_Finished] = Future()
    future.set_result(value)
    return future


@contextmanager
def _finishing(*, behind: bool) -> Iterator[Callable[..., Future[_Finished]]]:
    """Carries out calls one after another: at once, or in a thread while the next layer is computed."""
    if not behind:
        yield lambda work, *rest: _done(work(*rest))
        return
    with ThreadPoolExecutor(1, thread_name_prefix="finish") as pool:
        yield pool.submit


def _begin(
    state: CalibrationState,
    layers: Layers,
    shards: LayerShards,
    by_layer: Mapping[int, Sequence[Linear]],
    done: Mapping[int, list[str]],
) -> tuple[Reached, Stage]:
    """Where an earlier run stopped, if every piece of what it left is whole; else before the first layer.

    The codes of finished layers are gone, so a unit of theirs that is not whole on disk sends the walk back too.
    """
    try:
        reached = state.read()
        if reached is not None:
            _check_units(by_layer, reached.layer, done)
            shards.follow(reached.layer, done)
            return reached, layers.resumed(reached.layer, reached.states)
    except JournalError as error:
        logger.warning("%s; calibration starts again at the first layer", error)
    shards.follow(0, done)
    stage = layers.first()
    stage.sync()
    return state.begin(stage.digest), stage


def _check_units(by_layer: Mapping[int, Sequence[Linear]], layer: int, done: Mapping[int, list[str]]) -> None:
    """Raise JournalError unless all that finished layers wrote is whole on disk."""
    wanted = {unit for number, linears in by_layer.items() if number < layer for linear in linears for unit in linear.units}
    lost = len(wanted - done.keys())
    if lost:
        raise JournalError(f"{lost} of {len(wanted)} units of finished layers are damaged, or the journal has lost them")


def _report(number: int, count: int, rows: list[LogRow], seconds: float) -> None:
    methods: Mapping[str, int] = summarize(rows)["methods"]
    losses = [row.relative_loss for row in rows if row.relative_loss is not None]
    logger.info(
        "layer %d of 0 to %d: %s, mean relative loss %s, %.1f s",
        number, count - 1, ", ".join(f"{n} {name}" for name, n in sorted(methods.items())) or "nothing to quantize",
        f"{sum(losses) / len(losses):.4f}" if losses else "unknown", seconds,
    )  # fmt: skip

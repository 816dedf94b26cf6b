"""A calibrated run: walk a layer, quantize it, write its units, and go on with what the next layer sees.

Per layer the order is: sum statistics on the layer's inputs, choose codes, write the layer's units through the ordinary
executor, run the layer again with its quantized weights, make its outputs durable, and only then say that it is done.
Killed anywhere, a run does the layer it was in again from the same inputs, and gets the same bytes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from tensorsurgeon.calibrate.codes.linears import Linear, find_linears, linears_by_layer
from tensorsurgeon.calibrate.codes.stage import Layers, Stage
from tensorsurgeon.calibrate.codes.stored import StoredLayers
from tensorsurgeon.calibrate.codes.walked import WalkedLayers
from tensorsurgeon.calibrate.data.data import CalibrationData, load_data
from tensorsurgeon.calibrate.device import device_named, identity_of
from tensorsurgeon.calibrate.log import LOG_NAME, LogRow, log_bytes, read_log, rounded_row, summarize, summary_text
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.state import CalibrationState, Reached, file_digest
from tensorsurgeon.calibrate.walk.allocator import give_back_memory
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.calibrate.walk.statistics import layer_path
from tensorsurgeon.calibrate.walk.walk import Walk
from tensorsurgeon.checkpoint.sink import Sink, publish_bytes
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.errors import BudgetError, JournalError, NoMatchError, PlanViolationError, RecipeError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.quant.scheme import Quantized
from tensorsurgeon.quant.threads import one_torch_thread
from tensorsurgeon.running.executor import Progress, run_units
from tensorsurgeon.running.journal import Journal, state_folder
from tensorsurgeon.running.run import RunResult, run_plan

logger = logging.getLogger(__name__)


class CalibratedResult(NamedTuple):
    """``run`` as of any run; ``summary`` of the log (``log.summarize``), which lies in ``target/quant_log.csv``."""

    run: RunResult
    summary: dict[str, Any]


def run_calibrated(
    plan: Plan,
    target: str | os.PathLike[str],
    options: CalibrationOptions,
    *,
    workers: int | None = None,
    max_ram_bytes: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    stop: threading.Event | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> CalibratedResult:
    """Write the planned checkpoint, with codes that calibration chooses for the steps that ask for them.

    Neither ``workers`` nor ``max_ram_bytes`` changes a byte of it. ``device`` runs the forwards; GPTQ itself runs on the
    CPU. Raises what ``run_plan`` raises, RecipeError for data that cannot be used, NumericError for a model whose hidden
    states are not finite.
    """
    if not plan.needs_codes:
        raise RecipeError("no step of this transform asks for statistics (method gptq or imatrix); leave --calibration away")
    if find_spec("transformers") is None:
        raise RecipeError("calibration runs the model's own forward: pip install 'tensorsurgeon[calibrate]'")
    where = device_named(device)
    if options.write_statistics is not None and options.read_statistics is not None:
        raise RecipeError("--write-statistics and --read-statistics together would only copy a folder")
    model = StreamedModel(plan.source, device=where)
    if max_ram_bytes is not None:
        _check_budget(plan, model, max_ram_bytes)
    data = None
    if options.sources:
        data = load_data(options, plan.source.root, model.vocabulary_rows)
    linears = find_linears(plan, model)
    if not linears:
        raise NoMatchError("the steps that ask for statistics quantize nothing")
    # A source that was calibrated itself has a log, which must not take the place of this run's.
    files = plan.files._replace(copied=tuple(name for name in plan.files.copied if name != LOG_NAME))
    plan = replace(plan, files=files, calibration=_identity(options, data, where), extra_files=(LOG_NAME,))
    driver = _Driver(model=model, data=data, options=options, linears=linears, target=Path(target))
    with one_torch_thread():
        result = run_plan(
            plan, target, workers=workers, max_ram_bytes=max_ram_bytes, resume=resume, overwrite=overwrite, stop=stop,
            progress=progress, execute=driver.execute,
        )  # fmt: skip
    log = Path(target) / LOG_NAME
    summary = summarize(read_log(log)) if log.exists() else summarize([])
    for line in summary_text(summary).splitlines():
        logger.info("%s", line)
    return CalibratedResult(result, summary)


def _check_budget(plan: Plan, model: StreamedModel, max_ram_bytes: int) -> None:
    """Raise BudgetError if one layer's weights and codes do not fit the memory cap; hidden states lie in files."""
    specs = plan.source.specs
    largest = max(sum(specs[name].nbytes for name in model.source_names(n)) for n in range(len(model.layers)))
    needed = largest + largest // 2
    if needed > max_ram_bytes:
        raise BudgetError(
            f"calibration holds a decoder layer and its codes at once, {needed} bytes, more than --max-ram {max_ram_bytes}; "
            f"give at least {-(-needed // 1_000_000)}MB"
        )


def _identity(options: CalibrationOptions, data: CalibrationData | None, device: torch.device) -> dict[str, Any]:
    """What the record says of the calibration, and the fingerprint depends on."""
    versions = {"torch": torch.__version__, "transformers": _transformers_version()}
    known: dict[str, Any] = {"options": options.identity(), "versions": versions, "device": identity_of(device)}
    if data is not None:
        known |= {"sources": list(data.sources), "tokens": list(data.tokens.shape), "digest": data.digest}
    if options.read_statistics is not None:
        known["statistics"] = _folder_digest(options.read_statistics)
    return known


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


def _folder_digest(folder: Path) -> str:
    files = sorted(folder.glob(layer_path(Path(), 0).name.replace("00000", "*")))
    if not files:
        raise RecipeError(f"{folder}: holds no statistics (layer-*.safetensors)")
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(''.join(path.name + file_digest(path) for path in files).encode())}"


class _Codes:
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
        return Quantized(found.codes[rows], found.scale[rows], zero_point)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Driver:
    """Takes the place of the executor in ``run_plan``: layer by layer first, then all that is left."""

    model: StreamedModel
    data: CalibrationData | None
    options: CalibrationOptions
    linears: Sequence[Linear]
    target: Path

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
        layers = self._layers(TensorReader(plan.source, source), state, workers, stop)

        def write(
            units: set[int] | None, codes: Mapping[str, Quantized | None], digests: dict[int, list[str]]
        ) -> dict[int, list[str]]:
            return run_units(
                plan, source, sink, journal, done=digests, workers=workers, max_ram_bytes=max_ram_bytes, stop=stop,
                progress=progress, only=None if units is None else sorted(units), codes=_Codes(codes),
            )  # fmt: skip

        digests = dict(done)
        last = max(by_layer, default=-1)
        with ExitStack() as held:
            reached, stage = _begin(state, layers, by_layer, done)
            held.callback(stage.close)
            while stage.layer <= last:
                began = time.monotonic()
                number = stage.layer
                # Before each layer: what the one before it held is free by now.
                give_back_memory()
                made = layers.quantize(stage, by_layer.get(number, []), is_last=number == last)
                stage = made.next
                held.callback(stage.close)
                digests = write({unit for linear in by_layer.get(number, []) for unit in linear.units}, made.codes, digests)
                reached = state.advance(reached, made.rows, stage.digest)
                _report(number, len(self.model.layers), made.rows, time.monotonic() - began)
                # Whoever still holds the result must not hold a layer of codes while the next one is made.
                made.codes.clear()
        left = [linear for linear in self.linears if linear.layer is None]
        digests = write(None, dict.fromkeys((linear.module for linear in left), None), digests)
        rows = [row for number in sorted(by_layer) for row in state.rows(number)]
        rows += [rounded_row(None, linear.module, linear.reason) for linear in left]
        publish_bytes(self.target / LOG_NAME, log_bytes(rows))
        return digests

    def _layers(self, reader: TensorReader, state: CalibrationState, workers: int, stop: threading.Event) -> Layers:
        if self.data is not None:
            walk = Walk(self.model, reader, self.data.tokens)
            return WalkedLayers(
                model=self.model, reader=reader, options=self.options, walk=walk, state=state, workers=workers, stop=stop
            )  # fmt: skip
        if self.options.read_statistics is None:
            raise RecipeError("calibration needs data or statistics")
        return StoredLayers(
            model=self.model, reader=reader, options=self.options, folder=self.options.read_statistics, workers=workers, stop=stop
        )  # fmt: skip


def _begin(
    state: CalibrationState, layers: Layers, by_layer: Mapping[int, Sequence[Linear]], done: Mapping[int, list[str]]
) -> tuple[Reached, Stage]:
    """Where an earlier run stopped, if every piece of what it left is whole; else before the first layer.

    The codes of finished layers are gone, so a unit of theirs that is not whole on disk sends the walk back too.
    """
    try:
        reached = state.read()
        if reached is not None:
            _check_units(by_layer, reached.layer, done)
            return reached, layers.resumed(reached.layer, reached.states)
    except JournalError as error:
        logger.warning("%s; calibration starts again at the first layer", error)
    stage = layers.first()
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
        "layer %d/%d: %s, mean relative loss %s, %.1f s",
        number + 1, count, ", ".join(f"{n} {name}" for name, n in sorted(methods.items())) or "nothing to quantize",
        f"{sum(losses) / len(losses):.4f}" if losses else "unknown", seconds,
    )  # fmt: skip

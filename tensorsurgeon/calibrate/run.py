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
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tensorsurgeon.calibrate.codes.stage import LayerStage
from tensorsurgeon.calibrate.codes.targets import Target, find_targets
from tensorsurgeon.calibrate.data.data import CalibrationData, load_data
from tensorsurgeon.calibrate.log import LOG_NAME, LogRow, log_bytes, read_log, summarize, summary_text
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.walk.allocator import give_back_memory
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.calibrate.walk.statistics import layer_path
from tensorsurgeon.checkpoint.sink import Sink, publish_bytes
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.errors import BudgetError, NoMatchError, RecipeError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.quant.scheme import Quantized
from tensorsurgeon.quant.threads import one_torch_thread
from tensorsurgeon.running.executor import Progress, run_units
from tensorsurgeon.running.journal import Journal, state_folder
from tensorsurgeon.running.run import RunResult, run_plan

logger = logging.getLogger(__name__)

_DIGEST_BUFFER = 1 << 20


class CalibratedResult(NamedTuple):
    """``run`` as of any run; ``summary`` of the log (``log.summarize``), which lies in ``target/quant_log.csv``."""

    run: RunResult
    summary: dict[str, Any]


class Codes:
    """The codes of the layer under way, for the quantize steps to ask for."""

    def __init__(self) -> None:
        self.by_module: dict[str, Quantized] = {}

    def quantized(self, module: str, start: int, stop: int) -> Quantized | None:
        """Rows of the codes of a module; None for one that was not calibrated."""
        found = self.by_module.get(module)
        if found is None or stop - start == len(found.codes):
            return found
        rows = slice(start, stop)
        zero_point = None if found.zero_point is None else found.zero_point[rows]
        return Quantized(found.codes[rows], found.scale[rows], zero_point)


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
    if device != "cpu" and not torch.cuda.is_available():
        raise RecipeError(f"--device {device}: this torch sees no such device")
    if options.write_statistics is not None and options.read_statistics is not None:
        raise RecipeError("--write-statistics and --read-statistics together would only copy a folder")
    model = StreamedModel(plan.source, device=device)
    if max_ram_bytes is not None:
        _check_budget(plan, model, max_ram_bytes)
    data = None
    if options.sources:
        data = load_data(options, plan.source.root, model.vocabulary_rows)
    codes = Codes()
    plan = replace(plan, calibration=_identity(options, data), extra_files=(LOG_NAME,))
    driver = _Driver(plan, model, data, codes, options, Path(target))
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


def _identity(options: CalibrationOptions, data: CalibrationData | None) -> dict[str, Any]:
    """What the record says of the calibration, and the fingerprint depends on."""
    versions = {"torch": torch.__version__, "transformers": _transformers_version()}
    known: dict[str, Any] = {"options": options.identity(), "versions": versions}
    if data is not None:
        known |= {"sources": list(data.sources), "tokens": list(data.tokens.shape), "digest": data.digest}
    if options.read_statistics is not None:
        known["statistics"] = _folder_digest(options.read_statistics)
    return known


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


def _folder_digest(folder: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    files = sorted(folder.glob(layer_path(Path(), 0).name.replace("00000", "*")))
    if not files:
        raise RecipeError(f"{folder}: holds no statistics (layer-*.safetensors)")
    for path in files:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(_DIGEST_BUFFER):
                digest.update(block)
    return f"xxh3_128:{digest.hexdigest()}"


class _Driver:
    """Takes the place of the executor in ``run_plan``: layer by layer first, then all that is left."""

    def __init__(
        self, plan: Plan, model: StreamedModel, data: CalibrationData | None, codes: Codes, options: CalibrationOptions,
        target: Path,
    ) -> None:  # fmt: skip
        self._model = model
        self._data = data
        self._codes = codes
        self._options = options
        self._target = target
        self._targets = find_targets(plan, model)
        if not self._targets:
            raise NoMatchError("the steps that ask for statistics quantize nothing")

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
        folder = state_folder(self._target)
        by_layer = _by_layer(self._targets, len(self._model.layers))
        stage = LayerStage(plan, self._model, self._data, self._options, source, folder, workers=workers, stop=stop)

        def write(units: set[int] | None, digests: dict[int, list[str]]) -> dict[int, list[str]]:
            return run_units(
                plan, source, sink, journal, done=digests, workers=workers, max_ram_bytes=max_ram_bytes, stop=stop,
                progress=progress, only=None if units is None else sorted(units), codes=self._codes,
            )  # fmt: skip

        digests = dict(done)
        with stage:
            last = max(by_layer, default=-1)
            for number in range(stage.first_layer, last + 1):
                began = time.monotonic()
                # Before each layer: what the one before it held is free by now.
                give_back_memory()
                with stage.layer(number, by_layer.get(number, []), is_last=number == last) as made:
                    self._codes.by_module = made.codes
                    if by_layer.get(number):
                        digests = write({unit for t in by_layer[number] for unit in t.units}, digests)
                    self._codes.by_module = {}
                _report(number, len(self._model.layers), made.rows, time.monotonic() - began)
            digests = write(None, digests)
            rows = [row for number in sorted(by_layer) for row in stage.rows(number)]
        rows += [_left(target) for target in self._targets if target.layer is None]
        publish_bytes(self._target / LOG_NAME, log_bytes(rows))
        return digests


def _by_layer(targets: list[Target], count: int) -> dict[int, list[Target]]:
    """Targets by layer; those whose units also write what belongs to another layer are rounded to nearest."""
    layers: dict[int, set[int]] = {}
    for target in targets:
        for unit in target.units:
            layers.setdefault(unit, set()).add(-1 if target.layer is None else target.layer)
    found: dict[int, list[Target]] = {}
    for target in targets:
        if target.layer is not None and any(layers[unit] != {target.layer} for unit in target.units):
            target.layer, target.reason = None, "is written together with weights of another layer"
        if target.layer is not None:
            found.setdefault(target.layer, []).append(target)
    return {number: found[number] for number in range(count) if number in found}


def _left(target: Target) -> LogRow:
    return LogRow(None, target.module, None, "rtn", 0, None, None, None, 0.0, target.reason)


def _report(number: int, count: int, rows: list[LogRow], seconds: float) -> None:
    methods: Mapping[str, int] = summarize(rows)["methods"]
    losses = [row.relative_loss for row in rows if row.relative_loss is not None]
    logger.info(
        "layer %d/%d: %s, mean relative loss %s, %.1f s",
        number + 1, count, ", ".join(f"{n} {name}" for name, n in sorted(methods.items())) or "nothing to quantize",
        f"{sum(losses) / len(losses):.4f}" if losses else "unknown", seconds,
    )  # fmt: skip

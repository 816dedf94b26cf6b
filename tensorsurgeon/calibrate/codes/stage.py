"""One layer of a calibrated run: statistics, codes, and the hidden states that the next layer starts from."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from torch import nn

from tensorsurgeon.calibrate.codes.layer import LayerQuantizer
from tensorsurgeon.calibrate.codes.targets import Keys, Part, Target, parts_of
from tensorsurgeon.calibrate.data.data import CalibrationData
from tensorsurgeon.calibrate.log import LogRow, log_bytes, read_log, write_durably
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.walk.experts import ExpertInputs, ExpertStack, ExpertStatistics, InputStatistics, find_stacks
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.calibrate.walk.reading import TensorReader
from tensorsurgeon.calibrate.walk.statistics import (
    LayerObserver,
    LayerStatistics,
    StoredStatistics,
    layer_path,
    write_layer,
)
from tensorsurgeon.calibrate.walk.walk import Walk
from tensorsurgeon.calibrate.walk.workers import Turns, run_parallel
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.errors import JournalError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.quant.gptq.scale_search import dequantize
from tensorsurgeon.quant.rtn.plain_torch import tensor_of
from tensorsurgeon.quant.scheme import Quantized

# Beside the journal, which removes them with itself.
_STATE = "calibration.json"


class Layer(NamedTuple):
    """Codes by module name, and the rows of the log."""

    codes: dict[str, Quantized]
    rows: list[LogRow]


class LayerStage:
    """Goes through layers in order, from where a stopped run was; its state lies in ``folder``."""

    def __init__(
        self, plan: Plan, model: StreamedModel, data: CalibrationData | None, options: CalibrationOptions, source: Source,
        folder: Path, *, workers: int, stop: threading.Event,
    ) -> None:  # fmt: skip
        self._model = model
        self._options = options
        self._folder = folder
        self._workers = workers
        self._stop = stop
        self._reader = TensorReader(plan.source, source)
        self._walk = None if data is None else Walk(model, self._reader, data.tokens)
        self._hidden: HiddenStates | None = None
        self.first_layer = 0

    def __enter__(self) -> Self:
        state = self._folder / _STATE
        known = state.exists()
        if known:
            try:
                self.first_layer = int(json.loads(state.read_bytes())["layer"])
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError("is damaged; start over with --overwrite", where=str(state)) from error
        walk = self._walk
        if walk is not None:
            path = self._hidden_path(self.first_layer)
            # After the last layer there is nothing left to go on with.
            if not known:
                self._hidden = HiddenStates(path, walk.shape, self._model.dtype, create=True)
                walk.embed(self._hidden.write)
                self._hidden.sync()
            elif path.exists():
                self._hidden = HiddenStates(path, walk.shape, self._model.dtype, create=False)
                walk.embed(None)
        if not known:
            self._advance(0)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._hidden is not None:
            self._hidden.close()

    def rows(self, number: int) -> list[LogRow]:
        """The log of a finished layer."""
        return read_log(self._log_path(number))

    def _log_path(self, number: int) -> Path:
        return self._folder / f"log-{number:05d}.csv"

    def _hidden_path(self, number: int) -> Path:
        return self._folder / f"hidden-{number:05d}.bin"

    def _advance(self, number: int) -> None:
        write_durably(self._folder / _STATE, json.dumps({"layer": number}).encode())

    @contextmanager
    def layer(self, number: int, targets: Sequence[Target], *, is_last: bool) -> Iterator[Layer]:
        """Quantize a layer; what is done inside the block comes before the layer counts as done."""
        with ExitStack() as held:
            if self._walk is None:
                made = self._from_files(number, targets)
                yield made
            else:
                module = held.enter_context(self._model.layer(number, self._reader))
                outputs = None if is_last else HiddenStates(
                    self._hidden_path(number + 1), self._walk.shape, self._model.dtype, create=True
                )  # fmt: skip
                made, parts, codes = self._walked(number, module, targets, None if self._options.sequential else outputs)
                yield made
                if outputs is not None and self._options.sequential:
                    self._put_back(targets, parts, codes)
                    self._run(number, module, outputs)
                self._move_on(outputs)
            # Whoever still holds the result must not hold a layer of codes with it while the next one is made.
            made.codes.clear()
            write_durably(self._log_path(number), log_bytes(made.rows))
            self._advance(number + 1)
            self._hidden_path(number).unlink(missing_ok=True)

    def _move_on(self, outputs: HiddenStates | None) -> None:
        if self._hidden is not None:
            self._hidden.close()
        self._hidden = outputs

    def _run(self, number: int, module: nn.Module, outputs: HiddenStates | None, **observing: Any) -> None:
        assert self._walk is not None
        assert self._hidden is not None
        self._walk.run_layer(number, module, self._hidden, outputs, workers=self._workers, stop=self._stop, **observing)

    def _from_files(self, number: int, targets: Sequence[Target]) -> Layer:
        assert self._options.read_statistics is not None
        if not targets:
            return Layer({}, [])
        statistics = StoredStatistics(layer_path(self._options.read_statistics, number))
        layer = self._model.layers[number]
        stacks = find_stacks(self._model.layer_names[number], layer)
        own = {stack.first_name: not _is_known(statistics, stack.first_name) for stack in stacks}
        parts, without = self._parts(number, layer, stacks, targets, own)
        made, _ = self._quantized(targets, parts, without, statistics)
        return made

    def _walked(
        self, number: int, module: nn.Module, targets: Sequence[Target], outputs: HiddenStates | None
    ) -> tuple[Layer, list[Part], dict[int, Quantized]]:
        """Statistics from one pass over the layer's inputs, and codes; without targets only the outputs."""
        walk = self._walk
        assert walk is not None
        if not targets:
            if outputs is not None:
                self._run(number, module, outputs)
            return Layer({}, []), [], {}
        stacks = find_stacks(self._model.layer_names[number], module)
        own = {stack.first_name: self._options.expert_hessian == "own" for stack in stacks}
        parts, without = self._parts(number, module, stacks, targets, own)
        wanted = {part.rows.parameter.rpartition(".")[0] for part in parts}
        name = self._model.layer_names[number]
        linears = {f"{name}.{n}": m for n, m in module.named_modules() if f"{name}.{n}" in wanted and isinstance(m, nn.Linear)}
        used = [stack for stack in stacks if stack.name in wanted]
        turns = Turns()
        with ExitStack() as scratch:
            inputs = {}
            for k, stack in enumerate(used):
                samples, length, hidden = walk.shape
                path = self._folder / f"experts-{k}.bin"
                inputs[stack.name] = ExpertInputs(path, samples * length, hidden, self._model.dtype)
                scratch.callback(inputs[stack.name].close)
            observer = LayerObserver(linears, used, inputs, turns)
            with observer.watching():
                self._run(number, module, outputs, observer=observer.observe, turns=turns)
            experts = {}
            for stack in used:
                experts[stack.name] = ExpertStatistics(stack, inputs[stack.name], self._options)
                router = None if stack.router is None else module.get_submodule(stack.router)._parameters["weight"]
                experts[stack.name].choose(router)
            statistics = observer.result(experts)
            kept = _Keeping(statistics) if self._options.write_statistics is not None else None
            made, codes = self._quantized(targets, parts, without, kept or statistics)
            if kept is not None and self._options.write_statistics is not None:
                aliases = {part.key: statistics.shared_key(part.key) for part in parts}
                write_layer(self._options.write_statistics, number, kept.found, aliases)
        return made, parts, codes

    def _parts(
        self, number: int, layer: nn.Module, stacks: Sequence[ExpertStack], targets: Sequence[Target], own: Mapping[str, bool]
    ) -> tuple[list[Part], dict[int, str]]:
        name = self._model.layer_names[number]
        linears = {f"{name}.{local}" for local, module in layer.named_modules() if isinstance(module, nn.Linear)}
        heights = {}
        for stack in stacks:
            for parameter in (stack.first_name, stack.down_name):
                shape = stack.module._parameters[parameter.rpartition(".")[2]].shape  # type: ignore[union-attr]
                heights[parameter] = (int(shape[1]), parameter == stack.first_name and not own[stack.first_name])
        return parts_of(targets, self._model.traced_rows(number), Keys(linears, heights))

    def _quantized(
        self, targets: Sequence[Target], parts: Sequence[Part], without: Mapping[int, str], statistics: LayerStatistics
    ) -> tuple[Layer, dict[int, Quantized]]:
        quantizer = LayerQuantizer(targets, parts, statistics, self._options, self._reader)
        rows = quantizer.run(workers=self._workers, stop=self._stop)
        rows += [
            LogRow(targets[n].layer, targets[n].module, None, "rtn", 0, None, None, None, 0.0, reason)
            for n, reason in without.items()
        ]
        codes = {targets[n].module: quantized for n, quantized in quantizer.results.items()}
        return Layer(codes, rows), quantizer.results

    def _put_back(self, targets: Sequence[Target], parts: Sequence[Part], codes: Mapping[int, Quantized]) -> None:
        """Overwrite the layer's weights by what a reader of the output will compute with."""

        def put(number: int) -> None:
            part = parts[number]
            found = codes[part.target]
            rows = slice(part.start, part.stop)
            zero_point = None if found.zero_point is None else tensor_of(found.zero_point[rows])
            weight = dequantize(tensor_of(found.codes[rows]), tensor_of(found.scale[rows]), zero_point)
            parameter = self._model.model.get_parameter(part.rows.parameter)
            flat = parameter.view(-1, parameter.shape[-1])
            flat[part.rows.start : part.rows.stop] = weight.to(device=parameter.device, dtype=parameter.dtype)

        run_parallel(len(parts), put, workers=self._workers, stop=self._stop)


class _Keeping:
    """Hands statistics on and remembers them, so that they can be written."""

    def __init__(self, statistics: LayerStatistics) -> None:
        self._statistics = statistics
        self._lock = threading.Lock()
        self.found: dict[str, InputStatistics] = {}

    def shared_key(self, key: str) -> str:
        return self._statistics.shared_key(key)

    def of(self, key: str) -> InputStatistics | None:
        found = self._statistics.of(key)
        if found is not None:
            with self._lock:
                self.found[self.shared_key(key)] = found
        return found


def _is_known(statistics: StoredStatistics, key: str) -> bool:
    return statistics.shared_key(key) in statistics.tokens

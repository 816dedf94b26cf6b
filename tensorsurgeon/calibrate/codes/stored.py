"""Layers quantized from statistics that an earlier run kept: no text, no forward."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorsurgeon.calibrate.codes.layer import quantize_on_cpu
from tensorsurgeon.calibrate.codes.linears import Linear, ReadOriginal, keys_of, parts_of
from tensorsurgeon.calibrate.codes.stage import Layer, Stage, layer_of
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.calibrate.walk.stacks import find_stacks
from tensorsurgeon.calibrate.walk.statistics import StoredStatistics, layer_path
from tensorsurgeon.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayers:
    """``folder`` holds the statistics; there are no states between layers."""

    model: StreamedModel
    original: ReadOriginal
    options: CalibrationOptions
    folder: Path
    workers: int
    stop: threading.Event

    def first(self) -> Stage:
        return Stage(0, None)

    def resumed(self, layer: int, digest: str | None) -> Stage:
        return Stage(layer, None)

    def quantize(self, stage: Stage, linears: Sequence[Linear], *, is_last: bool) -> Layer:
        following = Stage(stage.layer + 1, None)
        if not linears:
            return Layer({}, [], following)
        statistics = StoredStatistics(layer_path(self.folder, stage.layer))
        if self.options.asymmetric and not statistics.crossed:
            raise RecipeError(
                f"{layer_path(self.folder, stage.layer)}: was written without the original layers' states",
                remedy=", which {asymmetric} needs; write statistics with {asymmetric} too, or give {asymmetric} 0",
            )
        name, module = self.model.layer_names[stage.layer], self.model.layers[stage.layer]
        stacks = find_stacks(name, module)
        # Experts had Hessians of their own where the file has none under the name that they would share.
        own = {stack.first_name: statistics.shared_key(stack.first_name) not in statistics.tokens for stack in stacks}
        parts, without = parts_of(linears, self.model.traced(stage.layer), keys_of(name, module, stacks, own))
        made = quantize_on_cpu(linears, parts, statistics, self.options, self.original, workers=self.workers, stop=self.stop)
        return layer_of(linears, made, without, following)

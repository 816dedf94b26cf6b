"""SignRound over one layer of the walk: its output brought nearer to the original's, from the codes that its linears have.

What goes in is what the quantized layers before put out; what should come out is what the original layers did. A step takes some
batches of the walk, sums the slopes of the error by every weight in the order of batches, and moves offsets and ranges
(``quant.signround``). The layer is transformers' own with the weights of the moment, so experts get slopes for what the router
sends them and the others stay as they are. The error over all batches is taken before the first step and on the way, and the
best is kept: a layer is never further from its target than it was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from tensorsurgeon.calibrate.announcing import announce
from tensorsurgeon.calibrate.codes.assembly import Assemblies
from tensorsurgeon.calibrate.codes.linears import Linear, Part, ReadOriginal
from tensorsurgeon.calibrate.codes.rules import TUNED, store_scale_of
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.lines import lines_of
from tensorsurgeon.calibrate.walk.slopes import Place, slopes_of
from tensorsurgeon.calibrate.walk.walk import Walk
from tensorsurgeon.calibrate.walk.workers import Turns, run_parallel
from tensorsurgeon.quant.gptq.scale_search import dequantize
from tensorsurgeon.quant.rtn.plain_torch import tensor_of
from tensorsurgeon.quant.signround.offsets import Codes, Offsets
from tensorsurgeon.quant.signround.options import SignRound

logger = logging.getLogger(__name__)

# Beside a layer and its codes, in its own bytes of BF16: original weights, offsets in F32, sums of slopes in F32; and what each
# worker holds of slopes.
HELD: Final = 5
HELD_BY_WORKER: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuner:
    """Tunes layers; ``workers`` threads take batches, as many as ``max_ram_bytes`` has room for, which changes no byte."""

    walk: Walk
    options: CalibrationOptions
    original: ReadOriginal
    workers: int
    stop: threading.Event
    max_ram_bytes: int | None = None

    def tune(
        self,
        number: int,
        module: nn.Module,
        inputs: HiddenStates,
        targets: HiddenStates,
        linears: Sequence[Linear],
        parts: Sequence[Part],
        made: Assemblies,
    ) -> None:
        """Change the codes in ``made`` of linears with method ``signround``, and the loaded layer's weights, which are those of
        the codes before and after."""
        began = time.monotonic()
        which = [part for part in parts if linears[part.linear].method == TUNED and made.is_as_started(part, self._started)]
        if not which:
            return
        options = self.options.tuning
        run = _Run(self, number, module, inputs, targets, linears, which, made)
        best = start = run.error()
        best_step = 0
        batches = self._batches(number, options)
        with run.wanting_slopes(), _in_one_order(self.walk.model.device):
            for step in range(options.steps):
                announce(None, None, f"layer {number}: SignRound step {step + 1} of {options.steps}")
                run.step(next(batches), step)
                if options.is_check(step):
                    error = run.error()
                    if error < best:
                        best, best_step = error, step + 1
                        run.keep()
        run.put_back()
        note = f"layer's mean squared error {start:.4g}, {best:.4g} at step {best_step} of {options.steps}"
        if not best_step:
            note = f"SignRound found nothing better in {options.steps} steps"
        made.tuned({part.linear for part in which}, TUNED if best_step else None, note, time.monotonic() - began)
        if best_step:
            logger.info("layer %d: SignRound, %s (%.1f %% off)", number, note, 100 * (1 - best / start))
        else:
            logger.info("layer %d: %s", number, note)

    @property
    def _started(self) -> str:
        return "rtn" if self.options.tuning.start == "rtn" else "gptq"

    def _batches(self, number: int, options: SignRound) -> Iterator[list[int]]:
        """Batches of the walk for one step after another: all of them in a new order, and again."""
        batches = self.walk.batches
        count = min(len(batches), max(1, -(-options.batch // (batches[0][1] - batches[0][0]))))
        generator = np.random.default_rng([self.options.seed, number])
        left: list[int] = []
        while True:
            if len(left) < count:
                left = generator.permutation(len(batches)).tolist()
            yield sorted(left[:count])
            left = left[count:]


class _Run:
    """One layer while it is tuned."""

    def __init__(
        self,
        tuner: Tuner,
        number: int,
        module: nn.Module,
        inputs: HiddenStates,
        targets: HiddenStates,
        linears: Sequence[Linear],
        parts: Sequence[Part],
        made: Assemblies,
    ) -> None:
        self._tuner, self._walk, self._number, self._module = tuner, tuner.walk, number, module
        self._inputs, self._targets = inputs, targets
        self._parts, self._made = parts, made
        self._device = tuner.walk.model.device
        self._parameters = {
            part.lines.name: tuner.walk.model.model.get_parameter(part.lines.name)
            for part in sorted(parts, key=lambda p: p.lines.name)
        }
        by_linear: dict[int, list[int]] = {}
        for place, part in enumerate(parts):
            by_linear.setdefault(part.linear, []).append(place)
        order = list(by_linear)
        offsets: dict[int, Offsets] = {}

        def begin(item: int) -> None:
            linear = linears[order[item]]
            whole = tensor_of(tuner.original(linear))
            for place in by_linear[order[item]]:
                part = parts[place]
                rows = whole[part.start : part.stop]
                offsets[place] = Offsets(
                    (rows if len(rows) == len(whole) else rows.clone()).to(self._device), self._codes(part),
                    num_bits=linear.scheme.num_bits, store_scale=store_scale_of(linear.scheme), options=tuner.options.tuning,
                )  # fmt: skip

        self._parallel(len(order), begin)
        self._offsets = [offsets[place] for place in range(len(parts))]

    def _parallel(self, count: int, work: Callable[[int], None], turns: Turns | None = None, workers: int | None = None) -> None:
        run_parallel(count, work, workers=workers or self._tuner.workers, stop=self._tuner.stop, turns=turns)

    def _codes(self, part: Part) -> Codes:
        codes, scale, zero_point = self._made.rows_of(part)
        zero = None if zero_point is None else torch.from_numpy(zero_point).to(self._device)
        return Codes(torch.from_numpy(codes).to(self._device), torch.from_numpy(scale).to(self._device), zero)

    def error(self) -> float:
        """The mean squared error over all batches, by the weights of the moment."""
        batches = self._walk.batches
        found = [0.0] * len(batches)

        def measure(batch: int) -> None:
            made = self._walk.call(self._number, self._module, self._inputs, batch)
            target = self._targets.read(*batches[batch]).to(self._device)
            found[batch] = float((made.float() - target.float()).square().sum(dtype=torch.float64)) / made.numel()

        self._parallel(len(batches), measure)
        total = sum(error * (stop - start) for error, (start, stop) in zip(found, batches, strict=True))
        return float(total / batches[-1][1])

    @contextmanager
    def wanting_slopes(self) -> Iterator[None]:
        """The parameters that are tuned want gradients, for the length of the block."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self._parameters.values():
                parameter.requires_grad_(False)

    def step(self, batches: Sequence[int], step: int) -> None:
        """Sum the slopes over ``batches``, move what they reach, and put its weights into the layer."""
        slopes = self._slopes(batches)

        def move(item: int) -> None:
            part = self._parts[item]
            mine = [found for found in (_rows_of(slopes, part), _rows_of(slopes, part, stacked=True)) if found is not None]
            if mine:
                self._offsets[item].step(mine[0] if len(mine) == 1 else mine[0].float() + mine[1].float(), step)
                self._put(item, self._offsets[item].made())

        self._parallel(len(self._parts), move)

    def _slopes(self, batches: Sequence[int]) -> dict[Place, Tensor]:
        total: dict[Place, Tensor] = {}
        turns = Turns()

        def add(item: int) -> None:
            batch = batches[item]
            target = self._targets.read(*self._walk.batches[batch]).to(self._device)
            found = slopes_of(
                lambda: self._walk.call(self._number, self._module, self._inputs, batch), target, self._parameters
            )  # fmt: skip
            with turns.turn("slopes", item):
                for place, slope in found.items():
                    if place not in total:
                        total[place] = slope if len(batches) == 1 else slope.float()
                    else:
                        total[place] += slope

        self._parallel(len(batches), add, turns, self._at_once())
        return total

    def _at_once(self) -> int:
        """How many batches have slopes in memory at once."""
        cap = self._tuner.max_ram_bytes
        if cap is None:
            return self._tuner.workers
        layer = sum(value.numel() * value.element_size() for value in self._module.parameters())
        room = cap - layer * (1 + HELD)
        return max(1, min(self._tuner.workers, room // max(1, layer * HELD_BY_WORKER)))

    def keep(self) -> None:
        """Take the codes of the moment as the layer's."""

        def take(item: int) -> None:
            now = self._offsets[item].made()
            for kept, found in zip(self._made.rows_of(self._parts[item]), now, strict=True):
                if kept is not None and found is not None:
                    kept[...] = found.cpu().numpy()

        self._parallel(len(self._parts), take)

    def put_back(self) -> None:
        """Weights of the codes that were kept into the layer."""
        self._parallel(len(self._parts), lambda item: self._put(item, self._codes(self._parts[item])))

    def _put(self, item: int, codes: Codes) -> None:
        part = self._parts[item]
        parameter = self._parameters[part.lines.name].detach()
        lines_of(parameter, part.lines).copy_(dequantize(*codes))


@contextmanager
def _in_one_order(device: torch.device) -> Iterator[None]:
    """On a GPU, gradients that are summed in the same order in every run, where torch has a way to."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _rows_of(slopes: Mapping[Place, Tensor], part: Part, *, stacked: bool = False) -> Tensor | None:
    """The slope of a part's rows [rows, K]; ``stacked``: where its expert's matrix was used by itself."""
    if not stacked:
        whole = slopes.get((part.lines.name, None))
        return None if whole is None else lines_of(whole, part.lines)
    mine = slopes.get((part.lines.name, part.expert)) if part.expert is not None else None
    if mine is None or part.expert is None:
        return None
    first = part.expert * mine.shape[1 if part.lines.turned else 0]
    return lines_of(mine, part.lines._replace(start=part.lines.start - first, stop=part.lines.stop - first))

"""Quantize the modules of one layer from the statistics of their inputs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.calibrate.codes.targets import Part, Target
from tensorsurgeon.calibrate.log import LogRow
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.walk.experts import InputStatistics
from tensorsurgeon.calibrate.walk.reading import TensorReader
from tensorsurgeon.calibrate.walk.statistics import LayerStatistics, is_finite
from tensorsurgeon.calibrate.walk.workers import run_parallel
from tensorsurgeon.errors import NumericError
from tensorsurgeon.formats.scales import scale_dtype_of
from tensorsurgeon.quant.gptq.gptq import STACK_ROWS, GptqResult, gptq, output_energy
from tensorsurgeon.quant.gptq.hessian import FlippedFactor, flipped_cholesky
from tensorsurgeon.quant.gptq.scale_search import StoreScale, dequantize, round_to_nearest, search_scale
from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.quant.rtn.plain_torch import TORCH_DTYPES, tensor_of
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import dtype_of

_MOST_DAMPING: Final = 2.0


@dataclass
class _Assembly:
    """Codes of one target while its parts come in, and what the log will say of it."""

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    methods: set[str] = field(default_factory=set)
    notes: set[str] = field(default_factory=set)
    tokens: list[int] = field(default_factory=list)
    damping: list[float] = field(default_factory=list)
    loss: float | None = None
    energy: float | None = None
    seconds: float = 0.0


class _Job(NamedTuple):
    """Parts that go by one input and one scheme, stacked as rows."""

    key: str
    scheme: Scheme
    method: str
    parts: tuple[Part, ...]


class _Rounded(NamedTuple):
    """The result for a stack of rows; losses are per row, or None where nothing could be measured."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    loss: np.ndarray | None
    energy: np.ndarray | None
    method: str
    damp_percent: float | None
    note: str


class LayerQuantizer:
    """Codes for the targets of one layer. ``results`` and ``rows`` are by target, filled by ``run``."""

    def __init__(
        self,
        targets: Sequence[Target],
        parts: Sequence[Part],
        statistics: LayerStatistics,
        options: CalibrationOptions,
        reader: TensorReader,
    ) -> None:
        self._targets = targets
        self._statistics = statistics
        self._options = options
        self._reader = reader
        self._jobs = _jobs(targets, parts, statistics)
        self._assemblies = {number: self._assembly(number) for number in sorted({part.target for part in parts})}
        self._experts = {part.target: part.expert for part in parts}
        self._lock = threading.Lock()
        self._shared = _SharedFactors(statistics, Counter(job.key for job in self._jobs), options)
        self.results: dict[int, Quantized] = {}

    def _assembly(self, number: int) -> _Assembly:
        target = self._targets[number]
        rows, columns = target.weight.shape
        groups = target.scheme.groups(columns)
        zero_point = None if target.scheme.symmetric else np.zeros((rows, groups), np.int8)
        return _Assembly(np.empty((rows, columns), np.int8), np.empty((rows, groups), np.float32), zero_point)

    def run(self, *, workers: int, stop: threading.Event) -> list[LogRow]:
        """Quantize everything; the log rows in the order of the targets."""
        run_parallel(len(self._jobs), lambda n: self._run(self._jobs[n]), workers=workers, stop=stop)
        rows = []
        for number, made in self._assemblies.items():
            self.results[number] = Quantized(made.codes, made.scale, made.zero_point)
            rows.append(self._row(number, made))
        return rows

    def _row(self, number: int, made: _Assembly) -> LogRow:
        target = self._targets[number]
        relative = None if made.loss is None or not made.energy else made.loss / made.energy
        return LogRow(
            target.layer, target.module, self._experts[number], "+".join(sorted(made.methods)), min(made.tokens),
            max(made.damping, default=None), made.loss, relative, made.seconds, "; ".join(sorted(n for n in made.notes if n)),
        )  # fmt: skip

    def _run(self, job: _Job) -> None:
        began = time.monotonic()
        arrays = [self._weight(part) for part in job.parts]
        statistics, factor = self._shared.take(job.key, job.method)
        try:
            weight, base = _base(arrays, job)
            rounded = self._round(weight, base, job, statistics, factor)
        except NumericError as error:
            raise NumericError(f"{self._targets[job.parts[0].target].weight.name}: {error.message}") from error
        finally:
            self._shared.done(job.key)
        seconds = time.monotonic() - began
        tokens = 0 if statistics is None else statistics.tokens
        start = 0
        for part in job.parts:
            stop = start + part.stop - part.start
            share = (stop - start) / weight.shape[0]
            with self._lock:
                self._put(part, rounded, slice(start, stop), tokens, seconds * share)
            start = stop

    def _weight(self, part: Part) -> np.ndarray:
        """The part's rows of the original weight, from the shards: nothing that an earlier step has overwritten."""
        whole = self._targets[part.target].read(self._reader)
        return whole if part.stop - part.start == len(whole) else whole[part.start : part.stop]

    def _round(
        self, weight: Tensor, base: Quantized, job: _Job, statistics: InputStatistics | None, factor: FlippedFactor | None
    ) -> _Rounded:
        scheme, options = job.scheme, self._options
        zero_point = None if base.zero_point is None else torch.from_numpy(base.zero_point)
        scale = torch.from_numpy(base.scale)
        if statistics is None or not statistics.tokens:
            note = "saw no calibration token"
        elif not is_finite(statistics):
            note = "saw inputs that are not finite"
        elif statistics.tokens < options.fallback_tokens:
            note = f"saw fewer than {options.fallback_tokens} calibration tokens"
        elif job.method == "imatrix":
            return _imatrix(weight, scale, zero_point, scheme, statistics)
        elif statistics.hessian is None:
            raise NumericError("the statistics hold diagonals only, which method gptq cannot use; use imatrix")
        elif factor is None:
            note = "saw inputs that are all zero"
        else:
            made = gptq(
                weight, statistics.hessian, scale=scale, zero_point=zero_point, qmin=scheme.qmin, qmax=scheme.qmax,
                group_size=scheme.group_size, options=replace(options.gptq, measure_energy=True),
                store_scale=store_scale_of(scheme), tokens=statistics.tokens, factor=factor,
            )  # fmt: skip
            return _from_gptq(made)
        codes = torch.from_numpy(base.codes)
        loss = energy = None
        if statistics is not None and statistics.tokens and is_finite(statistics):
            loss, energy = _measured(weight, codes, scale, zero_point, statistics)
        return _Rounded(codes, scale, zero_point, loss, energy, "rtn", None, note)

    def _put(self, part: Part, rounded: _Rounded, rows: slice, tokens: int, seconds: float) -> None:
        made = self._assemblies[part.target]
        here = slice(part.start, part.stop)
        made.codes[here] = rounded.codes[rows].numpy()
        made.scale[here] = rounded.scale[rows].numpy()
        if made.zero_point is not None and rounded.zero_point is not None:
            made.zero_point[here] = rounded.zero_point[rows].to(torch.int8).numpy()
        made.methods.add(rounded.method)
        made.notes.add(rounded.note)
        made.tokens.append(tokens)
        made.seconds += seconds
        if rounded.damp_percent is not None:
            made.damping.append(rounded.damp_percent)
        if rounded.loss is not None and rounded.energy is not None:
            made.loss = (made.loss or 0.0) + float(rounded.loss[rows].sum())
            made.energy = (made.energy or 0.0) + float(rounded.energy[rows].sum())


def _jobs(targets: Sequence[Target], parts: Sequence[Part], statistics: LayerStatistics) -> list[_Job]:
    """Parts that share an input and a scheme, at most ``STACK_ROWS`` rows together; a fixed number, so that bits stay."""
    groups: dict[tuple[str, int, str, int], list[Part]] = {}
    for part in parts:
        target = targets[part.target]
        group = (statistics.shared_key(part.key), id(target.scheme), target.method, target.weight.shape[1])
        groups.setdefault(group, []).append(part)
    jobs = []
    for (key, _, method, _), members in groups.items():
        scheme = targets[members[0].target].scheme
        batch: list[Part] = []
        filled = 0
        for part in members:
            rows = part.stop - part.start
            if batch and filled + rows > STACK_ROWS:
                jobs.append(_Job(key, scheme, method, tuple(batch)))
                batch, filled = [], 0
            batch.append(part)
            filled += rows
        jobs.append(_Job(key, scheme, method, tuple(batch)))
    return jobs


def damping_for(damp_percent: float, tokens: int, in_features: int) -> float:
    """Damping for statistics of real text: at least twice in_features / tokens, up to 2.

    Tokens of one text are no independent draws, and few of them make most of a down projection's input, so that GPTQ fits
    noise long after a Hessian has full rank. Measured on the fixture's experts (int4 g128, polished, error on held-out tokens
    over that of rounding to nearest): from 2 tokens per input feature 2.1 at 0.01 and 0.8 at 1; from 4, 1.3 and 0.7; from
    16, 0.61 and 0.55 at 0.1. ``quant.hessian.damp_for_tokens`` is the rule for independent tokens.
    """
    return max(damp_percent, min(_MOST_DAMPING, _MOST_DAMPING * in_features / max(1, tokens)))


class _SharedFactors:
    """Statistics and factors by key, computed by whoever comes first and let go when the last job has used them."""

    def __init__(self, statistics: LayerStatistics, uses: Counter[str], options: CalibrationOptions) -> None:
        self._statistics = statistics
        self._left = dict(uses)
        self._options = options
        self._lock = threading.Lock()
        self._locks = {key: threading.Lock() for key in uses}
        self._made: dict[str, tuple[InputStatistics | None, FlippedFactor | None]] = {}

    def take(self, key: str, method: str) -> tuple[InputStatistics | None, FlippedFactor | None]:
        """The statistics, and for GPTQ the factor of their damped Hessian where there is one to be had."""
        with self._locks[key]:
            if key not in self._made:
                found = self._statistics.of(key)
                factor = None
                if method == "gptq" and found is not None and found.hessian is not None and is_finite(found):
                    damping = damping_for(self._options.gptq.damp_percent, found.tokens, len(found.diagonal))
                    factor = flipped_cholesky(found.hessian, damping, self._options.gptq.act_order)
                self._made[key] = (found, factor)
            return self._made[key]

    def done(self, key: str) -> None:
        with self._lock:
            self._left[key] -= 1
            if not self._left[key]:
                self._made.pop(key, None)


def store_scale_of(scheme: Scheme) -> StoreScale:
    """Rounds scales to what the format stores under this (resolved) scheme."""
    stored = TORCH_DTYPES[scale_dtype_of(scheme)]
    return lambda scale: scale.to(stored).to(torch.float32)


def _base(arrays: Sequence[np.ndarray], job: _Job) -> tuple[Tensor, Quantized]:
    """The stacked weight in F32, and what rounding to nearest makes of it by the scheme's own rule."""
    stacked = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    stacked = np.ascontiguousarray(stacked)
    base = choose_backend("auto", job.scheme, dtype_of(stacked)).quantize(stacked, job.scheme)
    return tensor_of(stacked).float(), base


def _imatrix(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, statistics: InputStatistics) -> _Rounded:
    """Rounding to nearest, each group's scale searched for the least error weighted by the inputs' squares."""
    found = search_scale(
        weight, scale, zero_point, qmin=scheme.qmin, qmax=scheme.qmax, group_size=scheme.group_size,
        store_scale=store_scale_of(scheme), importance=statistics.diagonal,
    )  # fmt: skip
    codes = round_to_nearest(weight, found, zero_point, qmin=scheme.qmin, qmax=scheme.qmax)
    loss, energy = _measured(weight, codes, found, zero_point, statistics)
    return _Rounded(codes, found, zero_point, loss, energy, "imatrix", None, "")


def _measured(
    weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, statistics: InputStatistics
) -> tuple[np.ndarray, np.ndarray]:
    """Per row: loss and energy; by the diagonal alone where that is all there is."""
    change = weight - dequantize(codes, scale, zero_point)
    if statistics.hessian is not None:
        return output_energy(change, statistics.hessian).numpy(), output_energy(weight, statistics.hessian).numpy()
    diagonal = statistics.diagonal.numpy().astype(np.float64)
    return change.numpy().astype(np.float64) ** 2 @ diagonal, weight.numpy().astype(np.float64) ** 2 @ diagonal


def _from_gptq(made: GptqResult) -> _Rounded:
    energy = None if made.row_energy is None else made.row_energy.numpy()
    return _Rounded(made.codes, made.scale, made.zero_point, made.row_loss.numpy(), energy, made.method, made.damp_percent, "")

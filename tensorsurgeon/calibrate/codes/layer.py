"""Quantize the linears of one layer from the statistics of their inputs, on the CPU."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tensorsurgeon.calibrate.codes.assembly import Assemblies, Rounded
from tensorsurgeon.calibrate.codes.grids import LevelGrid, grid_of, largest_magnitude
from tensorsurgeon.calibrate.codes.linears import Linear, Part, ReadOriginal
from tensorsurgeon.calibrate.codes.rules import ALL_ZERO, chosen_by, damping_for, ridge_for, share_for, why_rounded
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.walk.experts import InputStatistics
from tensorsurgeon.calibrate.walk.statistics import LayerStatistics, is_finite
from tensorsurgeon.calibrate.walk.workers import run_parallel
from tensorsurgeon.errors import NumericError
from tensorsurgeon.quant.gptq.asymmetric import correction, leaning
from tensorsurgeon.quant.gptq.gptq import STACK_ROWS, gptq, output_energy
from tensorsurgeon.quant.gptq.hessian import FlippedFactor, flipped_cholesky
from tensorsurgeon.quant.gptq.scale_search import dequantize, round_to_nearest, search_scale
from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.quant.rtn.plain_torch import tensor_of
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F32, DType, dtype_of


class Job(NamedTuple):
    """Parts that go by one input and one scheme, stacked as rows."""

    key: str
    scheme: Scheme
    method: str
    parts: tuple[Part, ...]


def quantize_on_cpu(
    linears: Sequence[Linear],
    parts: Sequence[Part],
    statistics: LayerStatistics,
    options: CalibrationOptions,
    original: ReadOriginal,
    *,
    workers: int,
    stop: threading.Event,
    used: dict[str, InputStatistics] | None = None,
) -> Assemblies:
    """Codes for every linear that has parts; ``original`` reads their weights.

    ``used`` is filled with the statistics by key, where somebody wants to keep them.
    """
    jobs = jobs_of(linears, parts, statistics, options)
    assemblies = Assemblies(linears, parts)
    shared = SharedFactors(statistics, jobs, options, used)

    def run(number: int) -> None:
        put(assemblies, jobs[number], do(jobs[number], linears, shared, options, original))

    run_parallel(len(jobs), run, workers=workers, stop=stop)
    return assemblies


class Made(NamedTuple):
    """What a job came to, from how many tokens, and the worker's time."""

    rounded: Rounded
    tokens: int
    seconds: float


def do(job: Job, linears: Sequence[Linear], shared: SharedFactors, options: CalibrationOptions, original: ReadOriginal) -> Made:
    """Codes for the parts of a job, in this thread."""
    began = time.monotonic()
    arrays = [_weight(part, linears[part.linear], original) for part in job.parts]
    found = shared.take(job)
    try:
        amax = largest_magnitude(linears[job.parts[0].linear], linears, original)
        weight, base = _base(arrays, job, amax)
        rounded = _round(weight, base, job, found, options, amax)
    except NumericError as error:
        raise NumericError(f"{linears[job.parts[0].linear].weight.name}: {error.message}") from error
    finally:
        shared.done(job.key)
    return Made(rounded, 0 if found.statistics is None else found.statistics.tokens, time.monotonic() - began)


def put(assemblies: Assemblies, job: Job, made: Made) -> None:
    """Take what a job came to, part by part."""
    rows = sum(part.stop - part.start for part in job.parts)
    start = 0
    for part in job.parts:
        stop_row = start + part.stop - part.start
        share = made.seconds * (stop_row - start) / rows
        assemblies.put(part, made.rounded, slice(start, stop_row), made.tokens, share)
        start = stop_row


def _weight(part: Part, linear: Linear, original: ReadOriginal) -> np.ndarray:
    """The part's rows of the original weight, from the shards: nothing that an earlier step has overwritten."""
    whole = original(linear)
    return whole if part.stop - part.start == len(whole) else whole[part.start : part.stop]


def _round(
    weight: Tensor,
    base: Quantized,
    job: Job,
    found: _Shared,
    options: CalibrationOptions,
    amax: float | None,
) -> Rounded:
    scheme, statistics = job.scheme, found.statistics
    grid = grid_of(base, scheme)
    is_sound = statistics is not None and is_finite(statistics)
    note = why_rounded(0 if statistics is None else statistics.tokens, is_sound, options.fallback_tokens)
    if statistics is not None and not note and job.method != "rtn":
        if job.method == "imatrix":
            return _imatrix(weight, grid, base, statistics)
        if found.factor is not None:
            if found.step is not None:
                weight = leaning(weight, found.step, share_for(scheme, job.method, options))
                base = choose_backend("auto", scheme, F32).quantize(weight.numpy(), scheme, global_amax=amax)
                grid = grid_of(base, scheme)
            search = options.gptq.search if options.gptq.search is None or grid.search is None else grid.search
            made = gptq(
                weight, statistics.hessian, scale=grid.scale, zero_point=grid.zero_point, qmin=grid.low, qmax=grid.high,
                group_size=grid.group_size, options=replace(options.gptq, measure_energy=True, search=search),
                store_scale=grid.store_scale, tokens=statistics.tokens, factor=found.factor, spacing=grid.spacing,
                keep_scales=grid.keep_scales,
            )  # fmt: skip
            energy = None if made.row_energy is None else made.row_energy.numpy()
            return _rounded(grid, base, made.codes, made.scale, made.row_loss.numpy(), energy, made.method, made.damp_percent, "")
        note = ALL_ZERO
    loss = energy = None
    if statistics is not None and statistics.tokens and is_sound and job.method != "rtn":
        loss, energy = _measured(weight, grid.codes, grid.scale, grid.zero_point, statistics)
    return _rounded(grid, base, grid.codes, grid.scale, loss, energy, "rtn", None, note)


def jobs_of(
    linears: Sequence[Linear], parts: Sequence[Part], statistics: LayerStatistics, options: CalibrationOptions
) -> list[Job]:
    """Parts that share an input and a scheme, at most ``STACK_ROWS`` rows together; a fixed number, so that bits stay."""
    groups: dict[tuple[str, Scheme, str, DType, int, int], list[Part]] = {}
    for part in parts:
        linear = linears[part.linear]
        weight = linear.weight
        method = chosen_by(linear.method, options)
        # Blocks of rows, and a scale for the whole weight, are not stacked with another weight's.
        alone = part.linear if linear.scheme.block is not None or linear.scheme.type == "nvfp4" else -1
        group = (statistics.shared_key(part.key), linear.scheme, method, weight.dtype, weight.shape[1], alone)
        groups.setdefault(group, []).append(part)
    jobs = []
    for (key, scheme, method, *_), members in groups.items():
        batch: list[Part] = []
        filled = 0
        for part in members:
            rows = part.stop - part.start
            if batch and filled + rows > STACK_ROWS:
                jobs.append(Job(key, scheme, method, tuple(batch)))
                batch, filled = [], 0
            batch.append(part)
            filled += rows
        jobs.append(Job(key, scheme, method, tuple(batch)))
    return jobs


class _Shared(NamedTuple):
    """What jobs with one key share: statistics, the factor of their damped Hessian, and the ``correction`` that targets take."""

    statistics: InputStatistics | None
    factor: FlippedFactor | None
    step: Tensor | None


class SharedFactors:
    """Statistics and factors by key, computed by whoever comes first and let go when the last job has used them."""

    def __init__(
        self,
        statistics: LayerStatistics,
        jobs: Sequence[Job],
        options: CalibrationOptions,
        used: dict[str, InputStatistics] | None = None,
    ) -> None:
        uses = Counter(job.key for job in jobs)
        self._statistics = statistics
        self._used = used
        self._left = dict(uses)
        self._options = options
        self._lock = threading.Lock()
        self._locks = {key: threading.Lock() for key in uses}
        self._made: dict[str, _Shared] = {}

    def take(self, job: Job) -> _Shared:
        """The statistics, and for GPTQ the factor of their damped Hessian where there is one to be had."""
        key = job.key
        with self._locks[key]:
            known = self._made.get(key)
            if known is None:
                found = self._statistics.of(key)
                factor = None
                if job.method == "gptq" and found is not None and is_finite(found):
                    damping = damping_for(self._options.gptq.damp_percent, found.tokens, len(found.diagonal))
                    factor = flipped_cholesky(found.hessian, damping, self._options.gptq.act_order)
                known = self._made[key] = _Shared(found, factor, None)
                if self._used is not None and found is not None:
                    self._used[key] = found
            found, factor, step = known
            if not share_for(job.scheme, job.method, self._options):
                return _Shared(found, factor, None)
            if step is None and factor is not None and found is not None and found.cross is not None:
                ridge = ridge_for(found.tokens, len(found.diagonal))
                self._made[key] = known = _Shared(found, factor, correction(found.cross, found.hessian, ridge))
            return known

    def done(self, key: str) -> None:
        with self._lock:
            self._left[key] -= 1
            if not self._left[key]:
                self._made.pop(key, None)


def _base(arrays: Sequence[np.ndarray], job: Job, amax: float | None) -> tuple[Tensor, Quantized]:
    """The stacked weight in F32, and what rounding to nearest makes of it by the scheme's own rule."""
    stacked = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    stacked = np.ascontiguousarray(stacked)
    base = choose_backend("auto", job.scheme, dtype_of(stacked)).quantize(stacked, job.scheme, global_amax=amax)
    return tensor_of(stacked).float(), base


def _imatrix(weight: Tensor, grid: LevelGrid, base: Quantized, statistics: InputStatistics) -> Rounded:
    """Rounding to nearest, each group's scale searched for the least error weighted by the inputs' squares."""
    found = grid.scale if grid.keep_scales else search_scale(
        weight, grid.scale, grid.zero_point, qmin=grid.low, qmax=grid.high, group_size=grid.group_size,
        store_scale=grid.store_scale, importance=statistics.diagonal, options=grid.search, spacing=grid.spacing,
    )  # fmt: skip
    codes = round_to_nearest(weight, found, grid.zero_point, qmin=grid.low, qmax=grid.high, spacing=grid.spacing)
    loss, energy = _measured(weight, codes, found, grid.zero_point, statistics)
    return _rounded(grid, base, codes, found, loss, energy, "imatrix", None, "")


def _measured(
    weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, statistics: InputStatistics
) -> tuple[np.ndarray, np.ndarray]:
    """Per row: loss and energy."""
    change = weight - dequantize(codes, scale, zero_point)
    return output_energy(change, statistics.hessian).numpy(), output_energy(weight, statistics.hessian).numpy()


def _rounded(
    grid: LevelGrid,
    base: Quantized,
    codes: Tensor,
    scale: Tensor,
    loss: np.ndarray | None,
    energy: np.ndarray | None,
    method: str,
    damp_percent: float | None,
    note: str,
) -> Rounded:
    """Levels and their scales as they are packed."""
    codes, scale = grid.packed(codes, scale)
    return Rounded(codes, scale, grid.zero_point, loss, energy, method, damp_percent, note, base.global_scale)

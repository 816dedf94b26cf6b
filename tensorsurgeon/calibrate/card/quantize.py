"""Quantize the linears of one layer on the card: parts that are alike go in batches of a fixed size.

Batches are cut by the model's shapes alone, never by how much memory there is, for products of another size have other bits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from tensorsurgeon.calibrate.card.made import Made
from tensorsurgeon.calibrate.card.states import host_buffer
from tensorsurgeon.calibrate.codes import rules
from tensorsurgeon.calibrate.codes.assembly import Assemblies, Rounded
from tensorsurgeon.calibrate.codes.linears import Linear, Part, ReadOriginal
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.walk.experts import InputStatistics
from tensorsurgeon.calibrate.walk.lines import lines_of
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.errors import NumericError
from tensorsurgeon.quant.gptq.card.factor import correction
from tensorsurgeon.quant.gptq.card.gptq import Grid, dequantize, gptq_batch, round_to_nearest, search
from tensorsurgeon.quant.gptq.scale_search import ScaleSearch
from tensorsurgeon.quant.rtn.arithmetic import arithmetic_of
from tensorsurgeon.quant.rtn.plain_torch import TORCH_DTYPES, integer_codes, tensor_of
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import F32, DType

# Weights of one batch: 0.27 GB in F32, of which a batch needs about eight.
_BATCH_WEIGHTS: Final = 64 << 20
# Entries of the Hessians of one batch.
_BATCH_HESSIANS: Final = 128 << 20
_COPIERS: Final = 4


class CardStatistics(Protocol):
    """Statistics by key, for many keys of one width at a time."""

    def shared_key(self, key: str) -> str:
        """The key under which inputs that are one and the same are kept."""
        ...

    def is_early(self, key: str) -> bool:
        """Whether they are computed with weights that other keys' parts may overwrite."""
        ...

    def stack(self, keys: Sequence[str], columns: int) -> tuple[Tensor, list[int], Tensor | None]:
        """Hessians F32 [len(keys), columns, columns] on the card, tokens, and cross products where some are carried."""
        ...


class _Alike(NamedTuple):
    """What parts of one batch have in common."""

    scheme: Scheme
    method: str
    dtype: DType
    columns: int
    rows: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """``parts`` by key; each key's are ``alike.rows`` rows together."""

    alike: _Alike
    parts: dict[str, list[Part]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CardQuantizer:
    """Codes for the linears of a layer whose weights are on the card; ``device`` is the card."""

    linears: Sequence[Linear]
    statistics: CardStatistics
    options: CalibrationOptions
    model: StreamedModel
    original: ReadOriginal
    device: torch.device

    def run(self, parts: Sequence[Part], *, put_back: bool, used: dict[str, InputStatistics] | None = None) -> Assemblies:
        """Codes of all parts. ``put_back`` overwrites weights of the layer by what a reader of the output will have.

        ``used`` is filled with the statistics by key, in ordinary memory, where somebody wants to keep them.
        """
        assemblies = Assemblies(self.linears, parts)
        with ThreadPoolExecutor(_COPIERS, thread_name_prefix="codes") as pool:
            copies: list[Future[None]] = []
            for batch in self._batches(parts):
                try:
                    copies += self._run(batch, assemblies, pool, put_back, used)
                except NumericError as error:
                    first = next(iter(batch.parts.values()))[0]
                    raise NumericError(f"{self.linears[first.linear].weight.name}: {error.message}") from error
            for copy in copies:
                copy.result()
        return assemblies

    def _batches(self, parts: Sequence[Part]) -> list[_Batch]:
        by_key: dict[tuple[str, Scheme, str, DType, int], list[Part]] = {}
        for part in parts:
            linear = self.linears[part.linear]
            group = (self.statistics.shared_key(part.key), linear.scheme, rules.chosen_by(linear.method, self.options))
            by_key.setdefault((*group, linear.weight.dtype, linear.weight.shape[1]), []).append(part)
        alike: dict[_Alike, list[tuple[str, list[Part]]]] = {}
        for (key, scheme, method, dtype, columns), members in by_key.items():
            for some in _cut_rows(members, max(1, _BATCH_WEIGHTS // columns)):
                rows = sum(part.stop - part.start for part in some)
                alike.setdefault(_Alike(scheme, method, dtype, columns, rows), []).append((key, some))
        batches = []
        for kind, items in alike.items():
            most = max(1, min(_BATCH_WEIGHTS // (kind.rows * kind.columns), _BATCH_HESSIANS // kind.columns**2))
            waiting: dict[str, list[Part]] = {}
            for key, some in items:
                # A key whose rows were cut comes several times, each in a batch of its own.
                if len(waiting) == most or key in waiting:
                    batches.append(_Batch(kind, waiting))
                    waiting = {}
                waiting[key] = some
            batches.append(_Batch(kind, waiting))
        return sorted(batches, key=lambda batch: not all(map(self.statistics.is_early, batch.parts)))

    def _run(
        self,
        batch: _Batch,
        assemblies: Assemblies,
        pool: ThreadPoolExecutor,
        put_back: bool,
        used: dict[str, InputStatistics] | None,
    ) -> list[Future[None]]:
        began = time.monotonic()
        kind, keys = batch.alike, list(batch.parts)
        parts = [part for some in batch.parts.values() for part in some]
        hessian, tokens, cross = self.statistics.stack(keys, kind.columns)
        if used is not None:
            for b, key in enumerate(keys):
                crossed = None if cross is None else cross[b].cpu()
                used[key] = InputStatistics(tokens[b], hessian[b].diagonal().cpu(), hessian[b].cpu(), crossed)
        original = torch.cat([self._weight(part) for part in parts])
        if not bool(torch.isfinite(original).all()):
            raise NumericError("weight has entries that are not finite")
        codes, scale, zero_point = integer_codes(original, kind.scheme, arithmetic_of(kind.scheme, kind.dtype))
        shape = (len(keys), kind.rows, -1)
        made = Made(
            weight=original.float().view(len(keys), kind.rows, kind.columns), codes=codes.view(shape), scale=scale.view(shape),
            zero_point=None if zero_point is None else zero_point.view(shape).float(),
        )  # fmt: skip
        del original, codes, scale
        finite = torch.isfinite(hessian).flatten(1).all(1)
        some_input = (hessian.diagonal(dim1=1, dim2=2) > 0).any(1)
        sound, seen = torch.stack([finite, some_input]).cpu().tolist()
        fewest = self.options.fallback_tokens
        results = [_Result("rtn", None, rules.why_rounded(tokens[b], sound[b], fewest)) for b in range(len(keys))]
        grid = Grid(
            qmin=kind.scheme.qmin, qmax=kind.scheme.qmax, group_size=kind.scheme.group_size,
            store_scale=rules.store_scale_of(kind.scheme),
        )  # fmt: skip
        made.measure(hessian, [b for b in range(len(keys)) if results[b].note and tokens[b] and sound[b]])
        chosen = [b for b in range(len(keys)) if not results[b].note]
        if kind.method == "imatrix":
            self._imatrix(made, hessian, chosen, grid)
            for b in chosen:
                results[b] = _Result("imatrix", None, "")
        elif kind.method != "rtn":
            dark = [b for b in chosen if not seen[b]]
            made.measure(hessian, dark)
            for b in dark:
                results[b] = _Result("rtn", None, rules.ALL_ZERO)
            lit = [b for b in chosen if seen[b]]
            share = rules.share_for(kind.scheme, kind.method, self.options)
            if cross is not None and share and lit:
                ridge = [rules.ridge_for(tokens[b], kind.columns) for b in lit]
                self._lean(made, kind, correction(cross[lit], hessian[lit], ridge), share, lit)
            for b, damping in zip(lit, self._gptq(made, hessian, tokens, lit, grid), strict=True):
                results[b] = _Result("gptq", damping, "")
        if put_back:
            self._put_back(parts, dequantize(made.codes, made.scale, made.zero_point).view(-1, kind.columns))
        return self._to_host(batch, made, tokens, results, assemblies, pool, time.monotonic() - began)

    def _weight(self, part: Part) -> Tensor:
        """The part's rows of the original weight, from the layer where it has them as they are stored."""
        linear = self.linears[part.linear]
        parameter = self.model.model.get_parameter(part.lines.name)
        if parameter.dtype == TORCH_DTYPES[linear.weight.dtype]:
            return lines_of(parameter.detach(), part.lines)
        return tensor_of(self.original(linear))[part.start : part.stop].to(self.device)

    def _lean(self, made: Made, kind: _Alike, step: Tensor, share: float, which: list[int]) -> None:
        """Other targets, and what rounding to nearest makes of them."""
        weight = torch.baddbmm(made.weight[which], made.weight[which], step, alpha=share)
        codes, scale, zero_point = integer_codes(weight.view(-1, kind.columns), kind.scheme, arithmetic_of(kind.scheme, F32))
        made.weight[which], shape = weight, (len(which), kind.rows, -1)
        made.codes[which], made.scale[which] = codes.view(shape), scale.view(shape)
        if made.zero_point is not None and zero_point is not None:
            made.zero_point[which] = zero_point.view(shape).float()

    def _gptq(self, made: Made, hessian: Tensor, tokens: Sequence[int], which: list[int], grid: Grid) -> list[float]:
        if not which:
            return []
        damping = [rules.damping_for(self.options.gptq.damp_percent, tokens[b], hessian.shape[1]) for b in which]
        whole = len(which) == len(hessian)
        zero_point = made.zero_point
        found = gptq_batch(
            made.weight if whole else made.weight[which], hessian if whole else hessian[which],
            scale=made.scale if whole else made.scale[which],
            zero_point=zero_point if whole or zero_point is None else zero_point[which],
            damp_percent=torch.tensor(damping, dtype=torch.float64, device=self.device), grid=grid, options=self.options.gptq,
        )  # fmt: skip
        if whole:
            made.codes, made.scale = found.codes, found.scale
        else:
            made.codes[which], made.scale[which] = found.codes, found.scale
        made.loss[which], made.energy[which] = found.loss.double(), found.energy
        return [float(value) for value in found.damp_percent.cpu()]

    def _imatrix(self, made: Made, hessian: Tensor, which: list[int], grid: Grid) -> None:
        """Rounding to nearest, each group's scale searched for the least error weighted by the inputs' squares."""
        if not which:
            return
        zero_point = None if made.zero_point is None else made.zero_point[which]
        importance = hessian[which].diagonal(dim1=1, dim2=2)
        scale = search(made.weight[which], made.scale[which], zero_point, importance, grid, ScaleSearch())
        made.codes[which] = round_to_nearest(made.weight[which], scale, zero_point, grid)
        made.scale[which] = scale
        made.measure(hessian, which)

    def _put_back(self, parts: Sequence[Part], weight: Tensor) -> None:
        start = 0
        for part in parts:
            stop = start + part.stop - part.start
            parameter = self.model.model.get_parameter(part.lines.name)
            lines_of(parameter.detach(), part.lines).copy_(weight[start:stop])
            start = stop

    def _to_host(
        self,
        batch: _Batch,
        made: Made,
        tokens: Sequence[int],
        results: Sequence[_Result],
        assemblies: Assemblies,
        pool: ThreadPoolExecutor,
        seconds: float,
    ) -> list[Future[None]]:
        """Codes through pinned memory, and from there to their linears while the card goes on."""
        host = {}
        for name in ("codes", "scale", "zero_point", "loss", "energy"):
            value: Tensor | None = getattr(made, name)
            if value is not None:
                host[name] = host_buffer(tuple(value.shape), value.dtype, self.device)
                host[name].copy_(value, non_blocking=True)
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()

        def put(b: int, some: list[Part]) -> None:
            if arrived is not None:
                arrived.synchronize()
            result = results[b]
            measured = tokens[b] > 0 and not bool(host["loss"][b].isnan().any())
            rounded = Rounded(
                host["codes"][b], host["scale"][b], host["zero_point"][b] if "zero_point" in host else None,
                host["loss"][b].numpy() if measured else None, host["energy"][b].numpy() if measured else None,
                result.method, result.damp_percent, result.note,
            )  # fmt: skip
            start = 0
            for part in some:
                stop = start + part.stop - part.start
                share = seconds * (stop - start) / (batch.alike.rows * len(batch.parts))
                assemblies.put(part, rounded, slice(start, stop), tokens[b], share)
                start = stop

        return [pool.submit(put, b, some) for b, some in enumerate(batch.parts.values())]


class _Result(NamedTuple):
    method: str
    damp_percent: float | None
    note: str


def _cut_rows(parts: Sequence[Part], most: int) -> list[list[Part]]:
    """Runs of whole parts of at most so many rows, or of one part."""
    runs: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        rows = part.stop - part.start
        if runs[-1] and filled + rows > most:
            runs.append([])
            filled = 0
        runs[-1].append(part)
        filled += rows
    return runs

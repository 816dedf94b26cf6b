"""A calibrated run looked at before it is begun: what text it would have, which model runs it, what it would take.

One batch is walked through one layer for it, which tells the speed of this machine better than any table.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch

from tensorsurgeon.calibrate.codes.linears import Linear, find_linears
from tensorsurgeon.calibrate.codes.rules import is_tuned
from tensorsurgeon.calibrate.codes.tuned import HELD, HELD_BY_WORKER
from tensorsurgeon.calibrate.data.data import CalibrationData, load_data
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.model import StreamedModel, read_weights
from tensorsurgeon.calibrate.walk.walk import Walk
from tensorsurgeon.checkpoint.source import open_source
from tensorsurgeon.errors import RecipeError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.quant.threads import one_torch_thread
from tensorsurgeon.tensors.sizes import show_size

# Interpreter, torch, transformers, and what batches hold on the way through a layer.
_BESIDE_LAYER_BYTES: Final = 1_500_000_000
# Products of out x in x in that choosing codes takes, in those of one pass over a matrix: 115 s for a layer of 1.2 T on cores
# of 50 G a second each (docs/calibration.md), search and polishing included.
_CODES: Final = 4.5
# Forwards that a forward with its gradient, and what is done with it, come to.
_GRADIENT: Final = 4
_PROBE: Final = 1024
# Beside these three parts: the start, reading, packing, checks. By benchmarks/bench_rehearsal.py, which found 1.49 on the fixture
# and 1.59 on the real model's shapes.
_WHOLE: Final = 1.5


def rehearse(plan: Plan, options: CalibrationOptions, *, workers: int) -> dict[str, Any]:
    """What ``run_calibrated`` would do on the CPU: data, model, linears, bytes, seconds; its errors are those of that."""
    if not plan.needs_codes:
        raise RecipeError(
            "no step of this transform asks for statistics (method gptq, imatrix or signround)",
            remedy="; leave {calibration} away",
        )
    if not options.sources:
        raise RecipeError("a dry run of calibration needs its data", remedy="; give them with {calibration}")
    tuned = is_tuned(plan, options)
    model = StreamedModel(plan.source)
    data = load_data(options, plan.source.root, model.vocabulary_rows)
    linears = find_linears(plan, model)
    layers = sorted({linear.layer for linear in linears if linear.layer is not None})
    largest = max(map(model.layer_bytes, range(len(model.layers))))
    states = data.tokens.size * model.hidden_size * model.dtype.itemsize
    per_layer = _seconds_of_layer(model, data, linears, workers)
    memory = largest + largest // 2 + _BESIDE_LAYER_BYTES
    if tuned:
        memory += largest * (HELD + HELD_BY_WORKER)
        tuning = options.tuning
        tokens = min(tuning.batch, len(data.tokens)) * data.tokens.shape[1] * tuning.steps * _GRADIENT
        per_layer["signround"] = per_layer["walk"] / 2 * (tokens / data.tokens.size + 1 + tuning.checks)
    return {
        "model": type(model.model).__name__,
        "layers": len(model.layers),
        "workers": workers,
        "sequences": int(data.tokens.shape[0]),
        "sequence_length": int(data.tokens.shape[1]),
        "tokens": int(data.tokens.size),
        "sources": list(data.sources),
        "notes": list(data.notes),
        "linears": {
            "calibrated": sum(linear.layer is not None for linear in linears),
            "rounded": dict(Counter(linear.reason for linear in linears if linear.layer is None)),
        },
        "memory_bytes": memory,
        "scratch_bytes": 3 * states,
        "seconds": {
            "per_layer": {what: round(value, 2) for what, value in per_layer.items()},
            "all": round(_WHOLE * sum(per_layer.values()) * (1 + max(layers, default=-1)), 1),
        },
    }


def _seconds_of_layer(model: StreamedModel, data: CalibrationData, linears: list[Linear], workers: int) -> dict[str, float]:
    """``walk``: twice the forward of all tokens, from one batch; ``sums`` and ``codes``: from the speed of a product."""
    with ExitStack() as held, one_torch_thread():
        work = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="surgeon-rehearsal-")))
        source = held.enter_context(open_source(model.checkpoint))
        few = data.tokens[: max(1, _PROBE // data.tokens.shape[1])]
        walk = Walk(model, read_weights(model.weights.reader(source)), few, folder=work)
        states = held.enter_context(HiddenStates(work / "in", walk.shape, model.dtype, create=True, is_scratch=True))
        walk.embed(states.write)
        stop = threading.Event()
        with model.layer(0, walk.read) as layer:
            walk.run_layer(0, layer, states, None, workers=1, stop=stop)  # what is done once is done
            # Of the processor: what else runs here now would be taken for this machine's speed.
            began = time.process_time()
            walk.run_layer(0, layer, states, None, workers=1, stop=stop)
            forward = time.process_time() - began
        rate = workers * _products_per_second()
    mean = max(1, len({linear.layer for linear in linears if linear.layer is not None}))
    shapes = Counter(linear.weight.shape for linear in linears if linear.layer is not None)
    codes = sum(count * shape[0] * shape[1] ** 2 for shape, count in shapes.items()) / mean
    # Several linears share an input; experts see a few tokens each, and all of them together about as many as one linear.
    sums = sum(inputs**2 for inputs in {shape[1] for shape in shapes}) * data.tokens.size
    return {"walk": 2 * forward * data.tokens.size / few.size / workers, "sums": sums / rate, "codes": _CODES * codes / rate}


def _products_per_second() -> float:
    """Multiplications of F32 matrices that one thread does in a second of the processor."""
    one = torch.rand(768, 768)
    torch.mm(one, one)
    began = time.process_time()
    for _ in range(4):
        torch.mm(one, one)
    return 4 * 768**3 / (time.process_time() - began)


def rehearsal_text(found: dict[str, Any]) -> str:
    """The same for a person."""
    seconds = found["seconds"]
    parts = ", ".join(f"{what} {value:.1f}" for what, value in seconds["per_layer"].items())
    lines = [
        "calibration (a dry run: one batch went through one layer):",
        f"  model    {found['model']}, {found['layers']} layers",
        f"  data     {found['sequences']} sequences of {found['sequence_length']}, {found['tokens']} tokens: "
        + ", ".join(f"{source['name']} x {source['samples']}" for source in found["sources"]),
        f"  linears  {found['linears']['calibrated']} calibrated"
        + "".join(f", {count} rounded to nearest: {why}" for why, count in found["linears"]["rounded"].items()),
        f"  memory   about {show_size(found['memory_bytes'])}",
        f"  disk     {show_size(found['scratch_bytes'])} beside the output meanwhile",
        f"  time     about {_time(seconds['all'])} on {found['workers']} cores with nothing else to do; seconds a layer: {parts}",
        "           half or twice is no surprise; of a small model most is overhead, which is not counted",
    ]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

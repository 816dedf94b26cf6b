"""A calibrated run: walk a layer, quantize it, write its units, and go on with what the next layer sees.

Per layer the order is: sum statistics on the layer's inputs, choose codes, write the layer's units through the ordinary
executor, run the layer again with its quantized weights, make its outputs durable, and only then say that it is done.
Killed anywhere, a run does the layer it was in again from the same inputs, and gets the same bytes.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from tensorsurgeon.calibrate.announcing import announce
from tensorsurgeon.calibrate.card.budget import capped, plan_card
from tensorsurgeon.calibrate.codes.linears import Linear, find_linears
from tensorsurgeon.calibrate.codes.originals import is_asymmetric
from tensorsurgeon.calibrate.codes.rules import is_tuned, share_for
from tensorsurgeon.calibrate.codes.tuned import HELD, HELD_BY_WORKER
from tensorsurgeon.calibrate.data.data import CalibrationData, load_data
from tensorsurgeon.calibrate.device import device_named, identity_of, works_on_card
from tensorsurgeon.calibrate.driver import Driver
from tensorsurgeon.calibrate.log import LOG_NAME, read_log, summarize, summary_text
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.state import file_digest
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.calibrate.walk.statistics import layer_path
from tensorsurgeon.checkpoint.hub.stays import DEFAULT_AHEAD
from tensorsurgeon.errors import BudgetError, NoMatchError, PlanError, RecipeError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.quant.threads import one_torch_thread
from tensorsurgeon.running.executor import Progress
from tensorsurgeon.running.machines import HERE, Machines
from tensorsurgeon.running.run import NOTHING_BESIDE, Beside, RunResult, run_plan

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
    max_gpu_ram_bytes: int | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    command: Sequence[str] = (),
    beside: Beside = NOTHING_BESIDE,
    ahead: int = DEFAULT_AHEAD,
    keep_source: bool = False,
    machines: Machines = HERE,
) -> CalibratedResult:
    """Write the planned checkpoint, with codes that calibration chooses for the steps that ask for them.

    Neither ``workers`` nor ``max_ram_bytes`` nor ``max_gpu_ram_bytes`` changes a byte of it. ``device`` is where it is
    calibrated, ``cpu`` or ``cuda``: codes of the two differ in ties. Raises what ``run_plan`` raises, RecipeError for data
    that cannot be used, NumericError for a model whose hidden states are not finite, BudgetError for a card too small.
    """
    if not plan.needs_codes:
        raise RecipeError(
            "no step of this transform asks for statistics (method gptq, imatrix or signround)",
            remedy="; leave {calibration} away",
        )
    if find_spec("transformers") is None:
        raise RecipeError("calibration runs the model's own forward: pip install 'tensorsurgeon[calibrate]'")
    where = device_named(device)
    if options.write_statistics is not None and options.read_statistics is not None:
        raise RecipeError(
            "statistics that are read and written would only be copied", remedy="; give {write_statistics} or {read_statistics}"
        )
    on_card = works_on_card(where)
    if machines.crew is not None and (on_card or options.write_statistics is not None):
        what, option = ("a GPU is used", "device") if on_card else ("statistics are kept", "write_statistics")
        raise RecipeError(
            f"{what} by one machine, and several machines calibrate on their CPUs", remedy=f"; leave {{{option}}} or {{ray}} away"
        )
    model = StreamedModel(plan.source, device=where, experts_implementation="grouped_mm" if on_card else "eager")
    tuned = is_tuned(plan, options)
    if tuned and machines.crew is not None:
        raise RecipeError("SignRound tunes a layer on one machine", remedy="; leave {ray} away, or choose another method")
    if max_ram_bytes is not None and machines.crew is None:
        _check_budget(model, max_ram_bytes, tuned)
    data = None
    if options.sources:
        announce(None, None, "reading text")
        data = load_data(options, plan.source.root, model.vocabulary_rows)
    linears = find_linears(plan, model)
    if not linears:
        raise NoMatchError("the steps that ask for statistics quantize nothing")
    narrow = next((linear for linear in linears if linear.scheme.type != "int"), None)
    if on_card and narrow is not None:
        raise PlanError(
            f"{narrow.weight.name}: {narrow.scheme.type} codes are chosen on the CPU only, so far; calibrate with device cpu"
        )
    plan = replace(plan, calibration=_identity(options, data, where, linears), extra_files=(LOG_NAME,))
    card = None
    if on_card and data is not None:
        card = plan_card(
            model, (*data.tokens.shape, model.hidden_size), where, max_gpu_ram_bytes, is_asymmetric(linears, options), tuned
        )
    driver = Driver(
        model=model, data=data, options=options, linears=linears, target=Path(target), card=card, ahead=ahead,
        machines=machines,
    )  # fmt: skip
    with one_torch_thread(), nullcontext() if card is None else capped(where, card, max_gpu_ram_bytes):
        result = run_plan(
            plan, target, workers=workers, max_ram_bytes=max_ram_bytes, resume=resume, overwrite=overwrite, stop=stop,
            progress=progress, execute=driver.execute, command=command, ahead=ahead, keep_source=keep_source,
            beside=beside, machines=machines, least_bytes=_layer_bytes(model),
        )  # fmt: skip
    log = Path(target) / LOG_NAME
    summary = summarize(read_log(log)) if log.exists() else summarize([])
    for line in summary_text(summary).splitlines():
        logger.info("%s", line)
    return CalibratedResult(result, summary)


def _check_budget(model: StreamedModel, max_ram_bytes: int, tuned: bool) -> None:
    """Raise BudgetError if one layer's weights and codes do not fit the memory cap; hidden states lie in files."""
    needed = _layer_bytes(model)
    beside = ""
    if tuned:
        needed += max(map(model.layer_bytes, range(len(model.layers)))) * (HELD + HELD_BY_WORKER)
        beside = ", and what SignRound needs beside them"
    if needed > max_ram_bytes:
        raise BudgetError(
            f"calibration holds a decoder layer and its codes at once{beside}, {needed} bytes",
            remedy=f", more than {{max_ram}} {max_ram_bytes}; give at least {-(-needed // 1_000_000)}MB",
        )


def _layer_bytes(model: StreamedModel) -> int:
    """What a machine holds that calibrates: the weights of the largest layer, and its codes."""
    largest = max(map(model.layer_bytes, range(len(model.layers))))
    return largest + largest // 2


def _identity(
    options: CalibrationOptions, data: CalibrationData | None, device: torch.device, linears: Sequence[Linear]
) -> dict[str, Any]:
    """What the record says of the calibration, and the fingerprint depends on."""
    versions = {"torch": torch.__version__, "transformers": _transformers_version()}
    known: dict[str, Any] = {"options": options.identity(), "versions": versions, "device": identity_of(device)}
    # What was decided by grid: how many have it. No config has a word for either.
    known["signed_scales"] = sum(linear.scheme.has_signed_scales for linear in linears)
    known["leaning_targets"] = sum(share_for(linear.scheme, linear.method, options) > 0 for linear in linears)
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

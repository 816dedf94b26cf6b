"""The Python API: the command line's words as functions.

import tensorsurgeon as ts

plan = ts.plan([ts.transform("split-experts"), ts.Quantize(where=("{p*}.up_proj.weight",), format="ct-packed")], "model")
print(ts.describe(plan))
ts.apply(plan, "out", workers=2)
assert ts.verify("out", against="model").is_sound
print(ts.evaluate("out", against="model", text="heldout.txt").targets[0]["kl"])
ts.card("out", base_model="owner/model")
ts.page("out")
ts.push("out", "owner/out")
"""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.hub.stays import DEFAULT_AHEAD
from tensorsurgeon.evaluating.options import SAMPLES, SEQUENCE_LENGTH, TextOptions
from tensorsurgeon.look.diffing import Difference, diff_checkpoints
from tensorsurgeon.look.inspecting import inspect_checkpoint
from tensorsurgeon.ops.on_the_way import for_source
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.planning.report import plan_as_text
from tensorsurgeon.planning.rewriting import AnyTransform, Chain
from tensorsurgeon.publish.push import Pushed, push_checkpoint
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.machines import machines_at
from tensorsurgeon.running.run import RunResult, run_plan
from tensorsurgeon.tensors.sizes import parse_size
from tensorsurgeon.verifying.judging import Verification
from tensorsurgeon.verifying.judging import verify as verify_checkpoint

if TYPE_CHECKING:
    from tensorsurgeon.calibrate.options import CalibrationOptions
    from tensorsurgeon.evaluating.result import Evaluation

logger = logging.getLogger(__name__)

# Of a folder, or ``owner/name`` of a model on the Hub.
Path = str | os.PathLike[str]


def transform(name: str, **parameters: Any) -> Chain:
    """A built-in transform or a YAML file by name, with its parameters; RecipeError if either is unknown."""
    return load_transform(name, parameters)


def plan(transform: AnyTransform | str, source: Path, *, max_shard_size: int | str = "5GB") -> Plan:
    """What a transform (an op, a named transform, or a list of them) would do to a checkpoint, from headers alone.

    Raises PlanError and its kin for whatever does not fit; nothing is written.
    """
    size = parse_size(max_shard_size, "max_shard_size") if isinstance(max_shard_size, str) else max_shard_size
    chosen = load_transform(transform) if isinstance(transform, str) else transform
    checkpoint = open_checkpoint(source)
    return make_plan(for_source(chosen, checkpoint), checkpoint, max_shard_bytes=size)


def describe(plan: Plan, *, ahead: int = DEFAULT_AHEAD, keep_source: bool = False) -> str:
    """A plan as ``surgeon plan`` prints it; ``ahead`` and ``keep_source`` as ``apply`` would get them."""
    return plan_as_text(plan, ahead=ahead, keep_source=keep_source)


def apply(
    plan: Plan,
    target: Path,
    *,
    workers: int | None = None,
    max_ram: int | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    calibration: CalibrationOptions | None = None,
    device: str = "cpu",
    ahead: int = DEFAULT_AHEAD,
    keep_source: bool = False,
    ray: str | None = None,
) -> RunResult:
    """Write a plan's output into the folder ``target``; ``progress`` is told the bytes of each finished unit.

    Neither ``workers`` nor ``max_ram`` changes a byte. A run that was stopped continues with ``resume``. Steps whose
    method is another than ``rtn`` need ``calibration``, whose forward runs on ``device``. Of a source on the Hub ``ahead``
    shards are fetched before they are read; ``keep_source`` keeps them in the Hub's cache. ``ray`` is the
    address of a Ray cluster whose nodes do the work, ``auto`` for one that is started here; ``workers`` and ``max_ram`` are then
    those of each node. Where weights are quantized a first card is written beside them.
    """
    from tensorsurgeon.engines.advice import advise_all
    from tensorsurgeon.publish.beside import card_beside

    cap = parse_size(max_ram, "max_ram") if isinstance(max_ram, str) else max_ram
    beside = card_beside(plan, pathlib.Path(target), (), advise_all(plan), logger.warning)
    running: dict[str, Any] = {
        "workers": workers,
        "max_ram_bytes": cap,
        "resume": resume,
        "overwrite": overwrite,
        "ahead": ahead,
        "keep_source": keep_source,
        "progress": lambda done: None if progress is None else progress(done.nbytes),
        "beside": beside,
    }
    with machines_at(ray, workers, cap) as machines:
        if calibration is None:
            result = run_plan(plan, target, machines=machines, **running)
        else:
            from tensorsurgeon.calibrate.run import run_calibrated

            result = run_calibrated(plan, target, calibration, device=device, machines=machines, **running).run
    if result.was_complete:
        beside.write()
    return result


def inspect(path: Path) -> dict[str, Any]:
    """What is in a checkpoint, as ``surgeon inspect --json`` prints it."""
    return inspect_checkpoint(path)


def verify(target: Path, against: Path | None = None) -> Verification:
    """Judge a finished checkpoint, and with ``against`` compare it with its source; look at ``faults``."""
    return verify_checkpoint(target, against)


def evaluate(
    targets: Path | Sequence[Path],
    *,
    text: Path | Sequence[Path],
    against: Path | None = None,
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    seed: int = 0,
    float_inputs: bool = False,
    no_file: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """How far predictions of ``targets`` are from those of ``against``, a layer of each in memory; alone, perplexity.

    ``text`` names files of text or token ids, of which ``samples`` sequences are drawn. ``evaluation.json`` is written
    beside each target, unless ``no_file``; ``float_inputs`` leaves inputs as they are where a config quantizes them.
    ``progress`` is told steps done, steps in all, and at what. Raises RecipeError for a text or models that do not fit.
    """
    from tensorsurgeon.evaluating.result import write_evaluations
    from tensorsurgeon.evaluating.run import evaluate as run

    options = TextOptions(
        locations=tuple(str(os.fspath(one)) for one in _several(text)),
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
    )
    found = run(
        _several(targets), options, against=against, float_inputs=float_inputs, workers=workers, device=device,
        progress=lambda step: None if progress is None else progress(step.done, step.total, step.what),
    )  # fmt: skip
    if not no_file:
        write_evaluations(found)
    return found


def card(
    target: Path,
    *,
    base_model: str | None = None,
    name: str | None = None,
    against: Path | None = None,
    workers: int | None = None,
) -> pathlib.Path:
    """Write or refresh the model card of ``target``, what a person wrote in it kept; returns its place.

    ``base_model`` and ``name`` are ``owner/name`` of the original and of this checkpoint on the Hub. With ``against`` it is
    verified first, and the card has what was found.
    """
    from tensorsurgeon.publish.card import write_card

    return write_card(_verified(target, against, workers), base_model=base_model, name=name)


def page(target: Path, *, out: Path | None = None, against: Path | None = None, workers: int | None = None) -> pathlib.Path:
    """Draw ``target`` as one HTML file, ``surgeon.html`` in it unless ``out`` names another; returns its place.

    With ``against`` it is verified first, and the page shows what was found. RecipeError without the extra ``[page]``.
    """
    from tensorsurgeon.publish.page import write_page

    return write_page(_verified(target, against, workers), None if out is None else pathlib.Path(out))


def push(target: Path, repository: str, *, public: bool = False, anyway: bool = False, workers: int | None = None) -> Pushed:
    """Upload a finished checkpoint to the Hub as ``owner/name``, private unless told otherwise; faults stop it."""
    return push_checkpoint(target, repository, public=public, anyway=anyway, workers=workers)


def diff(a: Path, b: Path) -> Difference:
    """How two checkpoints differ: names, dtypes, shapes, bytes, config."""
    return diff_checkpoints(a, b)


def _several(given: Path | Sequence[Path]) -> Sequence[Path]:
    return (given,) if isinstance(given, str | os.PathLike) else given


def _verified(target: Path, against: Path | None, workers: int | None) -> pathlib.Path:
    from tensorsurgeon.publish.verified import checkpoint_folder, verify_and_keep

    folder = checkpoint_folder(target)
    if against is not None:
        verify_and_keep(folder, against, workers=workers)
    return folder

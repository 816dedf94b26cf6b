"""The Python API: the command line's words as functions.

import tensorsurgeon as ts

plan = ts.plan([ts.transform("split-experts"), ts.Quantize(where=("{p*}.up_proj.weight",), format="ct-packed")], "model")
print(ts.describe(plan))
ts.apply(plan, "out", workers=2)
assert ts.verify("out", against="model").is_sound
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.hub.stays import DEFAULT_AHEAD
from tensorsurgeon.look.diffing import Difference, diff_checkpoints
from tensorsurgeon.look.inspecting import inspect_checkpoint
from tensorsurgeon.ops.on_the_way import for_source
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.planning.report import plan_as_text
from tensorsurgeon.planning.rewriting import AnyTransform, Chain
from tensorsurgeon.publish.push import Pushed, push_checkpoint
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import RunResult, run_plan
from tensorsurgeon.tensors.sizes import parse_size
from tensorsurgeon.verifying.judging import Verification
from tensorsurgeon.verifying.judging import verify as verify_checkpoint

if TYPE_CHECKING:
    from tensorsurgeon.calibrate.options import CalibrationOptions

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


def describe(plan: Plan) -> str:
    """A plan as ``surgeon plan`` prints it."""
    return plan_as_text(plan)


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
) -> RunResult:
    """Write a plan's output into the folder ``target``; ``progress`` is told the bytes of each finished unit.

    Neither ``workers`` nor ``max_ram`` changes a byte. A run that was stopped continues with ``resume``. Steps whose
    method is another than ``rtn`` need ``calibration``, whose forward runs on ``device``. Of a source on the Hub ``ahead``
    shards are fetched before they are read; ``keep_source`` keeps them in the Hub's cache.
    """
    running: dict[str, Any] = {
        "workers": workers,
        "max_ram_bytes": parse_size(max_ram, "max_ram") if isinstance(max_ram, str) else max_ram,
        "resume": resume,
        "overwrite": overwrite,
        "ahead": ahead,
        "keep_source": keep_source,
        "progress": lambda done: None if progress is None else progress(done.nbytes),
    }
    if calibration is None:
        return run_plan(plan, target, **running)
    from tensorsurgeon.calibrate.run import run_calibrated

    return run_calibrated(plan, target, calibration, device=device, **running).run


def inspect(path: Path) -> dict[str, Any]:
    """What is in a checkpoint, as ``surgeon inspect --json`` prints it."""
    return inspect_checkpoint(path)


def verify(target: Path, against: Path | None = None) -> Verification:
    """Judge a finished checkpoint, and with ``against`` compare it with its source; look at ``faults``."""
    return verify_checkpoint(target, against)


def push(target: Path, repository: str, *, public: bool = False, anyway: bool = False) -> Pushed:
    """Upload a finished checkpoint to the Hub as ``owner/name``, private unless told otherwise; faults stop it."""
    return push_checkpoint(target, repository, public=public, anyway=anyway)


def diff(a: Path, b: Path) -> Difference:
    """How two checkpoints differ: names, dtypes, shapes, bytes, config."""
    return diff_checkpoints(a, b)

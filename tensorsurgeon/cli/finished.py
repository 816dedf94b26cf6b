"""What a person is told when a conversion is through, and the command as it would be typed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from tensorsurgeon.planning.codes import codes_text
from tensorsurgeon.tensors.sizes import show_size

if TYPE_CHECKING:
    from tensorsurgeon.engines.advice import EngineAdvice
    from tensorsurgeon.planning.plan import Plan

# Decide nothing of the result, or say only what this machine is like.
_OF_THIS_MACHINE: Final = frozenset({
    "workers", "max_ram", "ray", "resume", "overwrite", "quiet", "as_json", "backend", "require", "max_gpu_ram",
    "write_statistics", "ahead", "keep_source",
})  # fmt: skip


def command_elsewhere(ctx: click.Context) -> list[str]:
    """The command as it would be typed on another machine: files by name, the source by its, the target ``OUT``."""
    words = ["surgeon", str(ctx.info_name)]
    options: list[str] = []
    given = {**ctx.params, **ctx.params.get("calibration", {})}
    for parameter in ctx.command.params:
        name = str(parameter.name)
        value = given.get(name)
        if isinstance(parameter, click.Argument):
            words.append("OUT" if name == "target" else _by_name(str(value)))
        elif name not in _OF_THIS_MACHINE and name in given and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            flag = max(parameter.opts, key=len)
            values = value if isinstance(value, tuple) else (value,)
            options += [word for one in values for word in ((flag,) if one is True else (flag, _by_name(str(one))))]
    return words + options


def _by_name(text: str) -> str:
    """A file by its name alone, with the weight behind it if it has one; anything else as it is."""
    path, colon, weight = text.rpartition(":")
    if colon and Path(path).exists() and not Path(text).exists():
        return f"{Path(path).resolve().name}:{weight}"
    return Path(text).resolve().name if Path(text).exists() else text


def summary(
    plan: Plan, target: str, seconds: float, calibration: dict[str, Any] | None, advice: Sequence[EngineAdvice], source: str
) -> str:
    """Method, linears, sizes, time, ratio; what engines will say, silent garbage loudest; the next command."""
    from tensorsurgeon.planning.report import document

    shards = len(plan.layout.shards)
    lines = [
        f"{target}: {len(plan.specs)} tensors, {show_size(plan.output_bytes)} in {shards} shard{'s' if shards != 1 else ''}"
        f" ({plan.output_bytes / max(1, plan.source.weight_bytes):.0%} of the source), {_took(seconds)}"
    ]
    if plan.written:
        lines.append(f"  codes    {codes_text(plan, None if calibration is None else calibration['methods'])}")
    lines += [f"  engines  {line}" for line in engine_lines(advice)]
    lines.append(f"  next     surgeon verify {target} --against {source}")
    return document(lines)


def engine_lines(advice: Sequence[EngineAdvice]) -> list[str]:
    """One line for each engine, silent garbage first and in capitals."""
    loud, quiet = [], []
    for one in advice:
        garbage = next((a for a in one.advice if a.severity == "silent-garbage"), None)
        refusal = next((a for a in one.advice if a.severity == "refuses"), None)
        if garbage is not None:
            loud.append(f"{one.engine} {one.version}: LOADS IT AND ANSWERS NONSENSE: {garbage.subject}: {garbage.reason}")
        elif one.loads_at_tp:
            sizes = "" if one.asked_tp == (1,) else f" at tp {', '.join(map(str, one.loads_at_tp))}"
            quiet.append(f"{one.engine} {one.version}: loads{sizes}")
        elif refusal is not None:
            quiet.append(f"{one.engine} {one.version}: refuses: {refusal.subject}: {refusal.reason}")
        else:
            quiet.append(f"{one.engine} {one.version}: not judged")
    return loud + quiet


def _took(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"

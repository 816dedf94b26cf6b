"""The options of ``surgeon apply`` that have to do with calibration, and the choice between a plain and a calibrated run."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from tensorsurgeon.cli import completing
from tensorsurgeon.cli.terminal import at_home
from tensorsurgeon.errors import RecipeError
from tensorsurgeon.tensors.sizes import parse_size

if TYPE_CHECKING:
    from tensorsurgeon.planning.plan import Plan
    from tensorsurgeon.running.run import RunResult

_OPTIONS: Final = (
    click.option("--calibration", "sources", multiple=True, callback=at_home, shell_complete=completing.texts,
                 metavar="FILE[:WEIGHT]",
                 help="Text, JSON lines (text or messages), Parquet or token ids to calibrate on; several mix by weight. "
                      "The name of a Hub data set works where datasets is installed; builtin is a text that comes along."),
    click.option("--samples", type=click.IntRange(1), help="Chunks of text to calibrate on.  [default: 256]"),
    click.option("--sequence-length", type=click.IntRange(1), help="Tokens in each.  [default: 2048]"),
    click.option("--seed", type=click.IntRange(0), help="Which chunks are drawn.  [default: 0]"),
    click.option("--experts", type=click.Choice(["routed", "all", "balanced"]),
                 help="What experts are fed: what the router sends, every token, or what it sends topped up for cold "
                      "experts.  [default: balanced]"),
    click.option("--expert-hessian", type=click.Choice(["shared", "own"]),
                 help="One Hessian for the gate and up projections of all experts of a layer, or one each.  [default: shared]"),
    click.option("--minimum-tokens", type=click.IntRange(0), help="Tokens that balanced gives each expert.  [default: 512]"),
    click.option("--fallback-tokens", type=click.IntRange(0),
                 help="Modules that saw fewer are rounded to nearest.  [default: 8]"),
    click.option("--no-sequential", is_flag=True, help="Feed each layer what the original layers put out."),
    click.option("--asymmetric", type=click.FloatRange(0.0, 1.0), metavar="SHARE",
                 help="How far each layer makes up for the errors of those before it, 0 to 1.  "
                      "[default: 0.5 at 2 to 4 bits with signed scales and in FP4, else 0]"),
    click.option("--damp-percent", type=click.FloatRange(0.0),
                 help="Share of the Hessian's mean diagonal added to it.  [default: 0.01]"),
    click.option("--no-search", is_flag=True, help="Keep the scales of the scheme's rule."),
    click.option("--no-polish", is_flag=True, help="Plain GPTQ, without coordinate descent afterwards."),
    click.option("--signround", metavar="RECIPE",
                 help="How method signround tunes layers: default, or autoround, autoround-best or autoround-light for what "
                      "AutoRound does by those names; RECIPE:STEPS takes another number of steps.  [default: default]"),
    click.option("--write-statistics", metavar="FOLDER", help="Also keep the Hessians, for other formats and bit widths."),
    click.option("--read-statistics", metavar="FOLDER", help="Use kept Hessians instead of data."),
    click.option("--device", metavar="NAME", help="Where to calibrate: cpu, or cuda for a GPU.  [default: cpu]"),
    click.option("--max-gpu-ram", metavar="SIZE", help="Cap on the GPU's memory, such as 12GB; what is free by default."),
)  # fmt: skip
_NAMES: Final = (
    "sources", "samples", "sequence_length", "seed", "experts", "expert_hessian", "minimum_tokens", "fallback_tokens",
    "no_sequential", "asymmetric", "damp_percent", "no_search", "no_polish", "signround", "write_statistics", "read_statistics",
    "device", "max_gpu_ram",
)  # fmt: skip


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a click command, which gets what was given as one mapping, ``calibration``."""

    @functools.wraps(command)
    def collected(**given: Any) -> Any:
        own = {name: given.pop(name) for name in _NAMES}
        # Told apart from zero, which is a number that may be given.
        absent = {name for name, value in own.items() if value is None or value is False or value == ()}
        return command(calibration={name: value for name, value in own.items() if name not in absent}, **given)

    for option in reversed(_OPTIONS):
        collected = option(collected)
    collected.calibration_names = frozenset(_NAMES) - {"device", "max_gpu_ram"}  # type: ignore[attr-defined]  # for --help
    return collected


def calibrates(calibration: Mapping[str, Any], settings: Sequence[str]) -> bool:
    """Whether there is data that steps are to use; whoever names a method has said which."""
    wants = "sources" in calibration or "read_statistics" in calibration
    return wants and not any(setting.partition("=")[0] == "method" for setting in settings)


def run_with_calibration(
    plan: Plan,
    target: str,
    calibration: Mapping[str, Any],
    *,
    note: Callable[[str], None] | None = None,
    advance: Callable[[int | None, int | None, str], None] = lambda *_: None,
    ray: str | None = None,
    **running: Any,
) -> tuple[RunResult, dict[str, Any] | None]:
    """``run_plan`` or ``run_calibrated``, whichever the plan needs; ``running`` are the arguments that both take.

    ``note`` is told of each layer and of the summary, which is the second result; ``advance`` of where calibration is.
    Raises RecipeError where data is given that no step wants, and where it is wanted and not given.
    """
    from tensorsurgeon.running.machines import machines_at
    from tensorsurgeon.running.run import run_plan

    if not plan.needs_codes:
        if calibration:
            named = ", ".join(f"--{'calibration' if name == 'sources' else name.replace('_', '-')}" for name in calibration)
            raise RecipeError(f"no step of this transform asks for statistics; leave {named} away")
        with noting(note, "tensorsurgeon.running.cluster"), machines_at(ray, **_each_node(running)) as machines:
            return run_plan(plan, target, machines=machines, **running), None
    if "sources" not in calibration and "read_statistics" not in calibration:
        raise RecipeError(
            "this transform chooses codes by calibration: give --calibration FILE (text, JSON lines, Parquet or token ids), "
            "or --read-statistics FOLDER"
        )
    from tensorsurgeon.calibrate.run import run_calibrated

    given = dict(calibration)
    device = str(given.pop("device", "cpu"))
    cap = parse_size(given.pop("max_gpu_ram"), "--max-gpu-ram") if "max_gpu_ram" in given else None
    options = options_from(given)
    with (
        noting(note, advance=advance),
        noting(note, "tensorsurgeon.running.cluster"),
        machines_at(ray, **_each_node(running)) as machines,
    ):
        result = run_calibrated(plan, target, options, device=device, max_gpu_ram_bytes=cap, machines=machines, **running)
    return result.run, result.summary


def _each_node(running: Mapping[str, Any]) -> dict[str, Any]:
    return {name: running.get(name) for name in ("workers", "max_ram_bytes")}


def options_from(calibration: Mapping[str, Any]) -> Any:
    """``CalibrationOptions`` of what the command line gave."""
    from dataclasses import replace

    from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource
    from tensorsurgeon.quant.signround.options import recipe_named

    given = dict(calibration)
    fields: dict[str, Any] = {"sources": tuple(DataSource.parse(text) for text in given.pop("sources", ()))}
    fields["sequential"] = not given.pop("no_sequential", False)
    gptq = CalibrationOptions.default_gptq()
    if "damp_percent" in given:
        gptq = replace(gptq, damp_percent=given.pop("damp_percent"))
    if given.pop("no_search", False):
        gptq = replace(gptq, search=None)
    if given.pop("no_polish", False):
        gptq = replace(gptq, polish=None)
    if "signround" in given:
        fields["signround"] = recipe_named(given.pop("signround"))
    for name in ("write_statistics", "read_statistics"):
        if name in given:
            fields[name] = Path(given.pop(name)).expanduser()
    return CalibrationOptions(**fields, **given, gptq=gptq)


@contextmanager
def noting(
    note: Callable[[str], None] | None,
    name: str = "tensorsurgeon.calibrate",
    advance: Callable[[int | None, int | None, str], None] = lambda *_: None,
) -> Iterator[None]:
    """What a room logs while it works, told to the person at the terminal; ``advance`` is told where it is."""
    # transformers' advice on kernels for a GPU is of no use here. It reads this once, when it is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if note is None:
        yield
        return
    logger = logging.getLogger(name)
    handler = _Notes(note, advance)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Notes(logging.Handler):
    def __init__(self, note: Callable[[str], None], advance: Callable[[int | None, int | None, str], None]) -> None:
        super().__init__()
        self._note = note
        self._advance = advance

    def emit(self, record: logging.LogRecord) -> None:
        from tensorsurgeon.calibrate.announcing import announced

        found = announced(record)
        if found is not None:
            self._advance(*found)
        elif record.levelno >= logging.INFO:
            self._note(record.getMessage())

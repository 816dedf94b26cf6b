"""``surgeon apply``: carry out a plan."""

from __future__ import annotations

import io
import shlex
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tensorsurgeon.cli import completing
from tensorsurgeon.cli.calibrate import calibrates, calibration_options, run_with_calibration
from tensorsurgeon.cli.finished import command_elsewhere, summary
from tensorsurgeon.cli.plan import plan_named, transform_options
from tensorsurgeon.cli.resume import go_on, words_given
from tensorsurgeon.cli.terminal import (
    Place,
    Sectioned,
    Stop,
    at_home,
    emit,
    json_option,
    note,
    progress_bar,
    step_bar,
    stop_on_signals,
)
from tensorsurgeon.errors import ExecutionError, NumericError, SurgeonError
from tensorsurgeon.tensors.sizes import parse_size

if TYPE_CHECKING:
    from tensorsurgeon.planning.plan import Plan


@click.command(cls=Sectioned, short_help="Convert, quantize, calibrate: write a new checkpoint.")
@click.argument("transform", callback=at_home, shell_complete=completing.transforms)
@click.argument("source", type=Place(readable=False), required=False, metavar="SOURCE")
@click.argument("target", type=Place(readable=False), required=False, metavar="TARGET")
@transform_options
@click.option("--workers", type=click.IntRange(1, 256), help="Threads; the cores of this machine by default.")
@click.option("--max-ram", metavar="SIZE", help="Cap on the tensors in flight, such as 8GB; half of the free memory by default.")
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Let the nodes of a Ray cluster work, HOST:PORT, or auto to start one here; --workers and --max-ram are of each node.",
)
@click.option("--resume", is_flag=True, help="Continue the run that was stopped in TARGET; alone with TARGET: as it was begun.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that TARGET holds.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no messages.")
@json_option
@calibration_options
def apply(
    transform: str,
    source: str | None,
    target: str | None,
    settings: tuple[str, ...],
    then: tuple[str, ...],
    max_shard_size: str,
    backend: str,
    require: tuple[str, ...],
    ahead: int,
    keep_source: bool,
    workers: int | None,
    max_ram: str | None,
    ray: str | None,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    calibration: Mapping[str, Any],
) -> None:
    """Write TRANSFORM of SOURCE into the folder TARGET; a killed run continues with --resume.

    \b
    surgeon apply quark-w8a8-int8 Qwen3.6-35B-A3B Qwen3.6-35B-A3B-INT8
    surgeon apply split-experts model out --then my-renames.yaml --max-ram 8GB --workers 4
    surgeon apply gptq-int4-g128 Qwen3.6-35B-A3B out --calibration chats.jsonl:3 --calibration prose.txt
    """
    if resume and overwrite:
        raise click.UsageError("--resume continues a run and --overwrite replaces it; give one of them")
    context = click.get_current_context()
    if source is None and resume:
        go_on(context, transform, words_given(context), quiet, as_json)
        return
    if source is None or target is None:
        raise click.UsageError(f"Missing argument '{'SOURCE' if source is None else 'TARGET'}'.")
    made = plan_named(transform, then, settings, backend, source, max_shard_size, calibrated=calibrates(calibration, settings))
    if require:
        from tensorsurgeon.engines.advice import check_requirements

        check_requirements(made, require)
    if not quiet:
        if made.source.snapshot is not None:
            _tell_streaming(made, ahead, keep_source)
        for name in made.files.stale:
            note(f"note: {name} stays behind: it was made to tell of the source alone")
        for name in made.source.left_behind:
            note(f"note: {name} stays behind: it holds other weights than this checkpoint's")
        for oddity in made.source.oddities:
            note(f"note: {oddity}")
    cap = None if max_ram is None else parse_size(max_ram, "--max-ram")
    from tensorsurgeon.engines.advice import advise_all
    from tensorsurgeon.publish.beside import card_beside

    advice = advise_all(made)
    beside = card_beside(made, Path(target), command_elsewhere(context), advice, note)
    began = time.monotonic()
    # Where codes are chosen by calibration, that takes the time, and not the writing.
    bytes_shown = quiet or made.needs_codes
    with (
        stop_on_signals() as stop,
        progress_bar(made.output_bytes, bytes_shown) as advance,
        step_bar(quiet or not made.needs_codes) as (at, say),
        # Ray tells of lost nodes on standard output, which is for results; the run says it in a line.
        nullcontext() if ray is None else redirect_stdout(io.StringIO()),
    ):
        try:
            result, calibrated = run_with_calibration(
                made, target, calibration, note=None if quiet else say, advance=at, workers=workers, max_ram_bytes=cap, ray=ray,
                resume=resume, overwrite=overwrite, stop=stop, ahead=ahead, keep_source=keep_source,
                progress=lambda p: advance(p.nbytes), command=(transform, source, *words_given(context)),
                beside=beside,
            )  # fmt: skip
        except SurgeonError as error:
            raise Stop(error, _how_to_go_on(error, target, "sources" in calibration)) from error
    seconds = time.monotonic() - began
    if result.was_complete:
        beside.write()
    data = {
        "target": target,
        "tensors": len(made.specs),
        "bytes": made.output_bytes,
        "source_bytes": made.source.weight_bytes,
        "shards": len(made.layout.shards),
        "quantized_linears": len(made.quantized),
        "methods": dict(Counter(written.method for written in made.written.values())),
        "seconds": round(seconds, 3),
        "units": result.units,
        "resumed_units": result.resumed_units,
        **({} if calibrated is None else {"calibration": calibrated}),
    }
    text = summary(made, target, seconds, calibrated, advice, source)
    emit(data, text + ("\n  (was complete already)" if result.was_complete else ""), as_json)


def _tell_streaming(made: Plan, ahead: int, keep_source: bool) -> None:
    from tensorsurgeon.planning.pace import streaming_of
    from tensorsurgeon.planning.report import streaming_as_text

    streaming = streaming_of(made, ahead)
    if streaming is not None:
        note(f"source  {made.source}\n{streaming_as_text({**streaming._asdict(), 'kept': keep_source})}")


def _how_to_go_on(error: SurgeonError, target: str, is_calibrated: bool) -> str:
    """What a run that was stopped needs; nothing for errors that stopped it before it began."""
    match error:
        case NumericError():
            changed = "the source, the transform or the calibration" if is_calibrated else "the source or the transform"
            return f"; --resume would stop here again: change {changed} and use --overwrite"
        case ExecutionError(can_resume=True):
            return f"; continue with: surgeon resume {shlex.quote(target)}"
    return ""

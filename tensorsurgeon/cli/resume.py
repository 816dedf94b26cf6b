"""``surgeon resume``: go on with the command that a stopped run recorded, so that nobody has to type it again.

A run keeps its words and the folder it was typed in beside its journal. Words that are given now come behind them: other
``--workers``, another ``--max-ram``. What would decide bytes is another run, and the journal refuses it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from tensorsurgeon.cli.terminal import Place, emit, json_option, note, one_line
from tensorsurgeon.errors import JournalError, TargetError

# How a run is begun and shown, which is said anew each time.
_NOT_KEPT: Final = frozenset({"resume", "overwrite", "quiet", "as_json"})


def words_given(context: click.Context) -> list[str]:
    """The options of a command as they were given, in its order, each as one word."""
    return [word for option in context.command.params for word in _words(option, context)]


def _words(option: click.Parameter, context: click.Context) -> Iterator[str]:
    name = option.name or ""
    if not isinstance(option, click.Option) or name in _NOT_KEPT:
        return
    if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
        return
    flag = max(option.opts, key=len)
    value = context.params[name]
    for item in value if option.multiple else (value,):
        yield flag if option.is_flag else f"{flag}={item}"


@click.command(short_help="Go on with a run that was stopped.")
@click.argument("target", type=Place(readable=False))
@click.option("--workers", type=click.IntRange(1, 256), help="Threads; those of the stopped run by default.")
@click.option("--max-ram", metavar="SIZE", help="Cap on the tensors in flight; that of the stopped run by default.")
@click.option("--ray", metavar="ADDRESS", help="Another Ray cluster than the stopped run had, or none for this machine alone.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no messages.")
@json_option
@click.pass_context
def resume(context: click.Context, /, target: str, quiet: bool, as_json: bool, **others: Any) -> None:
    """Go on with the run that was stopped in the folder TARGET, by the command that it recorded.

    \b
    surgeon resume Qwen3.6-35B-A3B-INT8
    surgeon resume Qwen3.6-35B-A3B-INT8 --max-ram 8GB
    """
    go_on(context, target, words_given(context), quiet, as_json)


def go_on(context: click.Context, target: str, given: Sequence[str], quiet: bool, as_json: bool) -> None:
    """Run the recorded command for ``target``, wherever that lies now; of a finished run, look whether it still is whole."""
    from tensorsurgeon.running.journal import has_unfinished_run, read_identity

    place = Path(target).absolute()
    if not has_unfinished_run(place):
        _finished(place, target, as_json)
        return
    identity = read_identity(place)
    words, folder = identity.get("command"), identity.get("folder")
    if not (isinstance(words, list) and len(words) >= 2 and all(isinstance(word, str) for word in words)):
        raise JournalError(
            "the run that was stopped here recorded no command: it was begun from Python, or by an older version",
            where=target,
            remedy="; give it again with {resume}",
        )
    if isinstance(folder, str) and folder != os.getcwd():
        try:
            os.chdir(folder)
        except (OSError, ValueError) as error:
            raise JournalError(f"the run was begun in {folder}, which cannot be entered", where=target) from error
    transform, source, *options = words
    hub = identity.get("hub")
    if isinstance(hub, dict):
        # The branch may have moved on; what is done is of this commit.
        source = f"{hub.get('repository')}@{hub.get('commit')}"
    shown = [] if not quiet else ["--quiet"]
    shown += ["--json"] if as_json else []
    if not quiet:
        note(one_line(f"going on with: surgeon apply {shlex.join([transform, source, target, *options, *given])}"))
    group = context.find_root()
    command = group.command.get_command(group, "apply")  # type: ignore[attr-defined]
    with command.make_context("apply", [*options, *given, *shown, "--resume", "--", transform, source, str(place)], group) as own:
        command.invoke(own)


def _finished(place: Path, target: str, as_json: bool) -> None:
    from tensorsurgeon.machine.limits import usable_cores
    from tensorsurgeon.running.ownership import damaged_files
    from tensorsurgeon.running.record import read_record

    record = read_record(place) if place.is_dir() else None
    if record is None:
        raise TargetError("there is no stopped run to resume", where=target)
    damaged = damaged_files(place, record, usable_cores())
    if damaged:
        raise TargetError(
            f"there is no stopped run to resume: the run here was finished, and since then {', '.join(damaged[:4])} "
            f"{'was' if len(damaged) == 1 else 'were'} changed or removed",
            where=target,
            remedy="; make it anew with {overwrite}, or name another folder",
        )
    emit({"target": target, "was_complete": True}, f"{target}: was complete already", as_json)

"""What the commands share at the terminal: results, notes, progress, and the wish to stop."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import click

from tensorsurgeon.errors import SurgeonError


class Place(click.Path):
    """A path as a person writes it: ``~`` is the home folder also where no shell has seen it.

    A path of nothing, as of a variable that was never set, would be the current folder, and is refused.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty; name a folder, or . for this one", param, ctx)
        return super().convert(os.path.expanduser(value) if isinstance(value, str) else value, param, ctx)


def at_home(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """A callback of click for words that may be files and may be names: ``~`` as ``Place`` has it."""
    if isinstance(value, tuple):
        return tuple(map(os.path.expanduser, value))
    return os.path.expanduser(value) if isinstance(value, str) else value


class Sectioned(click.Command):
    """A command whose ``--help`` puts its options under headings; ``SECTIONS`` says which goes where, the rest comes first."""

    SECTIONS: Final = {
        "Running": frozenset(
            {"workers", "max_ram", "ray", "resume", "overwrite", "ahead", "keep_source", "device", "max_gpu_ram"}
        ),
        "Output": frozenset({"quiet", "as_json"}),
    }

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {"What to make": [], "Calibration": [], **{name: [] for name in self.SECTIONS}}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                rows[self._section(parameter)].append(record)
        for title, listed in rows.items():
            if listed:
                with formatter.section(title):
                    formatter.write_dl(listed)

    def _section(self, parameter: click.Parameter) -> str:
        if parameter.name in getattr(self.callback, "calibration_names", ()):
            return "Calibration"
        if "--help" in parameter.opts:
            return "Output"
        return next((title for title, names in self.SECTIONS.items() if parameter.name in names), "What to make")


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json`` to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")(command)


def emit(data: Any, text: str, as_json: bool) -> None:
    """Print a result: JSON for machines, text for people."""
    click.echo(json.dumps(data, indent=2) if as_json else printable(text))


# Control characters (a terminal acts on them), marks that turn the direction of writing, and halves of characters, which
# no stream takes. Lines and tabs are ours; what a stranger's name has of them is escaped where names are put into tables.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text of a stranger so that it only shows: what a terminal would act on is written as an escape, ``\\x1b``."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """The same for a message, which is one line whatever name is in it."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


class Stop(Exception):  # noqa: N818  # how a command ends, no fault of the command's
    """A deliberate error with advice that only this command can give: what is told, and the exit code."""

    def __init__(self, error: SurgeonError, advice: str) -> None:
        super().__init__(f"{told(error)}{advice}")
        self.exit_code = error.exit_code


class _Flags(dict[str, str]):
    """Options of a run as a command line spells them."""

    def __missing__(self, option: str) -> str:
        return f"--{option.replace('_', '-')}"


# Parameters of transforms, no options of the command.
_FLAGS = _Flags(inexact_scales="--set inexact_scales", method="--set method", verify="surgeon verify")


def told(error: SurgeonError) -> str:
    """An error's message with the command line's flags."""
    return error.told(_FLAGS)


def note(text: str) -> None:
    """A message to the person at the terminal."""
    click.echo(printable(text), err=True)


@contextmanager
def stop_on_signals(what: str = "after the units under way") -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM end the run in order; ``what`` says when it stops: units under way are finished and journalled."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        note(f"\nstopping {what} (again: at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(total_bytes: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar in bytes with time left, on stderr; silent when nobody looks."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    lock = threading.Lock()
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="writing", file=sys.stderr) as bar:

        def advance(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        yield advance


@contextmanager
def step_bar(quiet: bool) -> Iterator[tuple[Callable[[int | None, int | None, str], None], Callable[[str], None]]]:
    """A bar over steps that take time, and how to say something above it; silent when nobody looks.

    The bar is told (done, total, at what), None for what has not changed; without a terminal messages are lines on stderr.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda *_: None, note
        return
    from tqdm import tqdm

    lock = threading.Lock()
    shape = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
    with tqdm(total=1, desc="starting", file=sys.stderr, leave=False, bar_format=shape) as bar:
        first: list[int] = []

        def advance(done: int | None, total: int | None, what: str) -> None:
            with lock:
                if total is not None and total != bar.total:
                    bar.reset(total)
                    first.clear()
                if done is not None:
                    # Time left is told by what this run did, not by what an earlier one did for it.
                    if not first:
                        first.append(done)
                        bar.initial = bar.n = bar.last_print_n = done
                    bar.n = done
                bar.set_description_str(printable(what), refresh=False)
                bar.refresh()

        def say(text: str) -> None:
            with lock:
                bar.write(printable(text), file=sys.stderr)

        yield advance, say

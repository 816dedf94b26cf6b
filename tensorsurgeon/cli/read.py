"""The commands that only read: ``inspect``, ``verify`` and ``diff``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from tensorsurgeon.cli import completing
from tensorsurgeon.cli.terminal import Place, emit
from tensorsurgeon.errors import VerifyError

_workers = click.option("--workers", type=click.IntRange(1, 256), help="Threads; the cores of this machine by default.")
_quiet = click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")


@contextmanager
def reading_bar(total: Callable[[], int], quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar in bytes with time left, on stderr; silent when nobody looks, and then nothing is counted either."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    lock = threading.Lock()
    with tqdm(total=total(), unit="B", unit_scale=True, desc="reading", file=sys.stderr, leave=False) as bar:

        def advance(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        yield advance


@click.command(short_help="Show what a checkpoint holds.")
@click.argument("path", type=Place())
@_json
def inspect(path: str, as_json: bool) -> None:
    """Show what the checkpoint PATH holds, from headers alone: tensors, types, shards, quantization, oddities.

    \b
    surgeon inspect Qwen3.6-35B-A3B
    """
    from tensorsurgeon.look.inspecting import inspect_checkpoint, inspection_as_text

    data = inspect_checkpoint(path)
    emit(data, "" if as_json else inspection_as_text(data), as_json)


@click.command(short_help="Judge a checkpoint, alone or against its source.")
@click.argument("target", type=Place())
@click.option("--against", type=Place(), help="The checkpoint TARGET was made from: account for every tensor of it.")
@click.option(
    "--require",
    multiple=True,
    shell_complete=completing.engines,
    metavar="ENGINE[:tp=N]",
    help="Fail if this engine would not serve TARGET, such as vllm:tp=4; give it as often as needed.",
)
@_workers
@_quiet
@_json
@click.pass_context
def verify(
    ctx: click.Context,
    target: str,
    against: str | None,
    require: tuple[str, ...],
    workers: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Judge whether TARGET is what its index, config and record say; exit code 60 if it is not.

    With --against SOURCE every source tensor is accounted for, byte for byte where it passed through, and as signal
    to noise (dB) where it was quantized.

    \b
    surgeon verify Qwen3.6-35B-A3B-INT8 --against Qwen3.6-35B-A3B
    surgeon verify Qwen3.6-35B-A3B-INT8 --require vllm:tp=4
    """
    if require:
        from tensorsurgeon.engines.advice import parse_requirement

        for text in require:
            parse_requirement(text)  # a misspelt one is told before all bytes are read
    from tensorsurgeon import verifying
    from tensorsurgeon.verifying.judging import bytes_to_read
    from tensorsurgeon.verifying.reporting import verification_as_data, verification_as_text

    with reading_bar(lambda: bytes_to_read(target, against), quiet) as advance:
        found = verifying.verify(target, against, workers=workers, progress=advance)
    emit(verification_as_data(found) if as_json else None, "" if as_json else verification_as_text(found), as_json)
    if not found.is_sound:
        ctx.exit(VerifyError.exit_code)
    if require:
        from tensorsurgeon.checkpoint.folder import open_checkpoint
        from tensorsurgeon.engines.advice import check_requirements
        from tensorsurgeon.planning.plan import make_plan

        # A plan without steps: the checkpoint as it is.
        check_requirements(make_plan((), open_checkpoint(target)), require)


@click.command(short_help="Show how two checkpoints differ.")
@click.argument("a", type=Place())
@click.argument("b", type=Place())
@click.option("--headers-only", is_flag=True, help="Compare names, types and shapes, and no bytes.")
@_workers
@_quiet
@_json
@click.pass_context
def diff(ctx: click.Context, a: str, b: str, headers_only: bool, workers: int | None, quiet: bool, as_json: bool) -> None:
    """Show how checkpoint B differs from A, however each is sharded; exit code 0 if equal, 1 if not.

    \b
    surgeon diff Qwen3.6-35B-A3B Qwen3.6-35B-A3B-INT8 --headers-only
    """
    from tensorsurgeon.look.diffing import bytes_to_compare, diff_checkpoints, difference_as_data, difference_as_text

    with reading_bar(lambda: bytes_to_compare(a, b), quiet or headers_only) as advance:
        found = diff_checkpoints(a, b, headers_only=headers_only, workers=workers, progress=advance)
    emit(difference_as_data(found) if as_json else None, "" if as_json else difference_as_text(found), as_json)
    if not found.is_equal:
        ctx.exit(1)


@click.command(short_help="Print the JSON Schema of what --json prints.")
def schema() -> None:
    """Print what scripts may rely on in the output of --json, command by command, as one JSON Schema document.

    \b
    surgeon schema > surgeon.schema.json
    """
    from tensorsurgeon.cli.schema import whole_schema

    emit(whole_schema(), "", True)

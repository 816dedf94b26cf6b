"""``surgeon push``: a finished checkpoint to the Hub."""

from __future__ import annotations

import click

from tensorsurgeon.cli.read import reading_bar
from tensorsurgeon.cli.terminal import Place, emit, json_option, note


@click.command(short_help="Upload a checkpoint to the Hub, verified first.")
@click.argument("target", type=Place(readable=False))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Everybody may see it; private otherwise.")
@click.option("--anyway", is_flag=True, help="Push a checkpoint that verify finds faults in.")
@click.option("--workers", type=click.IntRange(1, 256), help="Threads to verify with; the cores of this machine by default.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars and no messages.")
@json_option
def push(target: str, repository: str, public: bool, anyway: bool, workers: int | None, quiet: bool, as_json: bool) -> None:
    """Upload the checkpoint TARGET to the Hub as OWNER/NAME; the same command again goes on where one was stopped.

    It is verified first, and not pushed if that finds faults. Nothing but the checkpoint is uploaded: no state of a run, no
    partial files, no other weights that lie beside it. Prints the address.

    \b
    surgeon push Qwen3.6-35B-A3B-INT8 owner/Qwen3.6-35B-A3B-INT8
    surgeon push Qwen3.6-35B-A3B-INT8 owner/Qwen3.6-35B-A3B-INT8 --public
    """
    import os

    from tensorsurgeon.publish.push import push_checkpoint
    from tensorsurgeon.verifying.judging import bytes_to_read

    if quiet:
        # The library draws its own; what it is told in Python holds for the process, and so does this.
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with reading_bar(lambda: bytes_to_read(target, None), quiet) as advance:
        found = push_checkpoint(target, repository, public=public, anyway=anyway, workers=workers, progress=advance)
    if not quiet:
        note(f"{found.files} files, {'private' if found.private else 'public'}, commit {found.commit}")
    emit(found._asdict() if as_json else None, found.address, as_json)

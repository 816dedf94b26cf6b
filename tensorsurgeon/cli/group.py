"""The command ``surgeon``: results on stdout, progress and messages on stderr, one message per fault."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import click

from tensorsurgeon.cli.apply import apply
from tensorsurgeon.cli.plan import plan, transforms
from tensorsurgeon.cli.read import diff, inspect, verify
from tensorsurgeon.errors import SurgeonError, did_you_mean
from tensorsurgeon.version import __version__


class _Surgeon(click.Group):
    """Suggests the nearest command, and turns deliberate errors into one line and an exit code."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"no command {args[0]!r}{did_you_mean(args[0], self.list_commands(ctx))}") from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SurgeonError as error:
            click.echo(f"surgeon: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            # The reader of our output went away; that is its right.
            sys.stderr.close()
            ctx.exit(141)
        except KeyboardInterrupt:
            click.echo("surgeon: stopped", err=True)
            ctx.exit(130)
        except MemoryError:
            click.echo("surgeon: out of memory; give a smaller --max-ram or fewer --workers", err=True)
            ctx.exit(40)
        except OSError as error:
            click.echo(f"surgeon: {error.filename or 'a file'}: {error.strerror}", err=True)
            ctx.exit(40)


@click.group(cls=_Surgeon, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="surgeon")
def main() -> None:
    """Take safetensors checkpoints apart and put them together in the layout a serving engine wants.

    \b
    surgeon plan  quark-w8a8-int8 Qwen3.6-35B-A3B
    surgeon apply quark-w8a8-int8 Qwen3.6-35B-A3B Qwen3.6-35B-A3B-INT8
    surgeon verify Qwen3.6-35B-A3B-INT8 --against Qwen3.6-35B-A3B
    """
    # A plan is hundreds of thousands of small objects and no cycles: walking them again and again helps nobody.
    gc.disable()


for _command in (inspect, plan, apply, verify, diff, transforms):
    main.add_command(_command)


def run() -> None:
    """The console script: the command, and then the end of the process without taking every plan apart again."""
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        # Freeing a plan of the 67 GB model tensor by tensor takes a tenth of a second, for nobody.
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))

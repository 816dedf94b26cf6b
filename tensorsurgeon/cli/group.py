"""The command ``surgeon``: results on stdout, progress and messages on stderr, one message per fault."""

from __future__ import annotations

import sys
import traceback
from typing import Any, Final

import click

from tensorsurgeon.cli.apply import apply
from tensorsurgeon.cli.evaluate import evaluate
from tensorsurgeon.cli.plan import plan, transforms
from tensorsurgeon.cli.publish import card, page
from tensorsurgeon.cli.push import push
from tensorsurgeon.cli.read import diff, inspect, schema, verify
from tensorsurgeon.cli.resume import resume
from tensorsurgeon.cli.terminal import Stop, note, one_line, told
from tensorsurgeon.errors import SurgeonError, did_you_mean, our_fault
from tensorsurgeon.machine.limits import raise_open_files_limit
from tensorsurgeon.version import __version__


class _Surgeon(click.Group):
    """Suggests the nearest command, and turns deliberate errors into one line and an exit code."""

    SECTIONS: Final = {
        "Look": ("inspect", "plan", "diff", "transforms", "schema"),
        "Convert": ("apply", "resume"),
        "Judge and measure": ("verify", "evaluate"),
        "Publish": ("card", "page", "push"),
    }

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Commands in the order of a publisher's day, each with the whole first line of its help."""
        width = max(map(len, self.commands))
        for title, names in self.SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), str(self.commands[name].short_help)) for name in names])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"no command {args[0]!r}{did_you_mean(args[0], self.list_commands(ctx))}") from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (SurgeonError, Stop) as error:
            note(one_line(f"surgeon: {told(error) if isinstance(error, SurgeonError) else error}"))
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
            note(one_line(f"surgeon: {error.filename or 'a file'}: {error.strerror}"))
            ctx.exit(40)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # noqa: BLE001  # the last place where a fault of ours can be told as one
            if ctx.params.get("verbose", 0) > 1:
                traceback.print_exc()
            said = " ".join(f"{type(error).__name__}: {error}".split())
            note(f"surgeon: {one_line(said[:300])}; {our_fault()} (surgeon -vv shows where it happened)")
            ctx.exit(70)


@click.group(cls=_Surgeon, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--verbose", "-v", count=True, help="Twice (-vv): show where in the code a fault of surgeon's own happened.")
@click.version_option(__version__, prog_name="surgeon")
def main(verbose: int) -> None:
    """Take safetensors checkpoints apart and put them together in the layout a serving engine wants.

    \b
    surgeon plan  quark-w8a8-int8 Qwen3.6-35B-A3B
    surgeon apply quark-w8a8-int8 Qwen3.6-35B-A3B Qwen3.6-35B-A3B-INT8
    surgeon verify Qwen3.6-35B-A3B-INT8 --against Qwen3.6-35B-A3B
    """
    raise_open_files_limit()


for _command in (inspect, plan, apply, resume, verify, diff, evaluate, card, page, push, transforms, schema):
    main.add_command(_command)


def run() -> None:
    """The console script."""
    main()

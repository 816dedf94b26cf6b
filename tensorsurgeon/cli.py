"""The command ``surgeon``: results on stdout, progress and messages on stderr, one message per fault."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from tensorsurgeon.errors import RecipeError, SurgeonError, did_you_mean
from tensorsurgeon.sizes import parse_size, show_size
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


def run() -> None:
    """The console script: the command, and then the end of the process without taking every plan apart again."""
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        # Freeing a plan of the 67 GB model tensor by tensor takes a tenth of a second, for nobody.
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")(command)


def _transform_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a parameter of the transform."),
        click.option("--then", multiple=True, metavar="NAME", help="Chain another transform; --set KEY=VALUE goes to those that have KEY."),
        click.option("--max-shard-size", default="5GB", show_default=True, help="Largest output shard."),
        click.option("--backend", type=click.Choice(["auto", "fast", "torch"]), default="auto", show_default=True,
                     help="Who computes: compiled CPU kernels or torch; the bits are the same."),
        click.option("--require", multiple=True, metavar="ENGINE[:tp=N]",
                     help="Stop if this engine would not serve the result, such as vllm:tp=4; give it as often as needed."),
    ):  # fmt: skip
        command = option(command)
    return command


def emit(data: Any, text: str, as_json: bool) -> None:
    """Print a result: JSON for machines, text for people."""
    click.echo(json.dumps(data, indent=2) if as_json else text)


def note(text: str) -> None:
    """A message to the person at the terminal."""
    click.echo(text, err=True)


def _load(transform: str, then: Sequence[str], settings: Sequence[str], backend: str) -> Any:
    from tensorsurgeon.library import find_recipe, load_transform

    given = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set takes KEY=VALUE, found {setting!r}")
        given[key] = value
    names = [transform, *then]
    parameters = {name: find_recipe(name).parameters for name in names}
    known = [key for own in parameters.values() for key in own]
    for key in given:
        if key not in known:
            where = " and ".join(names)
            raise RecipeError(f"{where} has no parameter {key!r}{did_you_mean(key, known)}" + ("" if known else "; it has none"))
    return [
        load_transform(name, {k: v for k, v in given.items() if k in parameters[name]}, backend=backend) for name in names
    ]


@main.command()
@click.argument("transform")
@click.argument("source", type=click.Path(readable=False))
@_transform_options
@_json_option
def plan(
    transform: str,
    source: str,
    settings: tuple[str, ...],
    then: tuple[str, ...],
    max_shard_size: str,
    backend: str,
    require: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what TRANSFORM would do to SOURCE, from headers alone: nothing is read but headers, nothing written.

    \b
    surgeon plan quark-w8a8-int8 Qwen3.6-35B-A3B
    surgeon plan ct-w4a16-g32 Qwen3.6-35B-A3B --require vllm:tp=4 --require sglang
    """
    from tensorsurgeon.checkpoint import open_checkpoint
    from tensorsurgeon.engines.advice import advice_as_data, advice_as_text, advise_all, check_requirements
    from tensorsurgeon.plan import make_plan
    from tensorsurgeon.report import plan_as_data, plan_as_text

    made = make_plan(
        _load(transform, then, settings, backend),
        open_checkpoint(source),
        max_shard_bytes=parse_size(max_shard_size, "--max-shard-size"),
    )
    check_requirements(made, require)
    advice = advise_all(made)
    if as_json:
        emit(plan_as_data(made) | {"engines": advice_as_data(advice)}, "", True)
    else:
        emit(None, f"{plan_as_text(made)}\n\n{advice_as_text(advice)}", False)


@main.command()
@click.argument("transform")
@click.argument("source", type=click.Path(readable=False))
@click.argument("target", type=click.Path(readable=False))
@_transform_options
@click.option("--workers", type=click.IntRange(1, 256), help="Threads; the cores of this machine by default.")
@click.option("--max-ram", metavar="SIZE", help="Cap on the tensors in flight, such as 8GB; half of the free memory by default.")
@click.option("--resume", is_flag=True, help="Continue the run that was stopped in TARGET.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that TARGET holds.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no messages.")
@_json_option
def apply(
    transform: str,
    source: str,
    target: str,
    settings: tuple[str, ...],
    then: tuple[str, ...],
    max_shard_size: str,
    backend: str,
    require: tuple[str, ...],
    workers: int | None,
    max_ram: str | None,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write TRANSFORM of SOURCE into the folder TARGET; a killed run continues with --resume.

    \b
    surgeon apply quark-w8a8-int8 Qwen3.6-35B-A3B Qwen3.6-35B-A3B-INT8
    surgeon apply split-experts model out --then my-renames.yaml --max-ram 8GB --workers 4
    """
    from tensorsurgeon.checkpoint import open_checkpoint
    from tensorsurgeon.engines.advice import check_requirements
    from tensorsurgeon.plan import make_plan
    from tensorsurgeon.run import run_plan

    if resume and overwrite:
        raise click.UsageError("--resume continues a run and --overwrite replaces it; give one of them")
    made = make_plan(
        _load(transform, then, settings, backend),
        open_checkpoint(source),
        max_shard_bytes=parse_size(max_shard_size, "--max-shard-size"),
    )
    check_requirements(made, require)
    if not quiet:
        for name in made.source.left_behind:
            note(f"note: {name} stays behind: it holds other weights than this checkpoint's")
        for oddity in made.source.oddities:
            note(f"note: {oddity}")
    cap = None if max_ram is None else parse_size(max_ram, "--max-ram")
    with _stop_on_signals() as stop, _progress_bar(made.output_bytes, quiet) as advance:
        try:
            result = run_plan(
                made, target, workers=workers, max_ram_bytes=cap, resume=resume, overwrite=overwrite, stop=stop,
                progress=lambda p: advance(p.nbytes),
            )  # fmt: skip
        except SurgeonError as error:
            if 40 <= error.exit_code < 50 or error.exit_code == 130:
                error.message += f"; continue with: surgeon apply ... {target} --resume"
            raise
    data = {
        "target": target,
        "tensors": len(made.specs),
        "bytes": made.output_bytes,
        "shards": len(made.layout.shards),
        "quantized_linears": len(made.quantized),
        "units": result.units,
        "resumed_units": result.resumed_units,
    }
    text = (
        f"{target}: {data['tensors']} tensors, {show_size(made.output_bytes)} in {data['shards']} shards"
        + (f", {data['quantized_linears']} linears quantized" if made.quantized else "")
        + (" (was complete already)" if result.was_complete else "")
    )
    emit(data, text, as_json)


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM end the run in order: units under way are finished and journalled."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        note("\nstopping after the units under way (again: at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress_bar(total_bytes: int, quiet: bool) -> Iterator[Callable[[int], None]]:
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


@main.command()
@click.argument("name", required=False)
@_json_option
def transforms(name: str | None, as_json: bool) -> None:
    """List the built-in transforms, or show one with its parameters and steps.

    \b
    surgeon transforms
    surgeon transforms quark-w8a8-int8
    """
    from tensorsurgeon.library import builtin_names, find_recipe
    from tensorsurgeon.report import table

    if name is None:
        recipes = [find_recipe(n) for n in builtin_names()]
        data: Any = [{"name": r.name, "description": r.description} for r in recipes]
        emit(data, "\n".join(f"{r.name}\n    {r.description}" for r in recipes), as_json)
        return
    recipe = find_recipe(name)
    parameters = [
        {"name": p.name, "default": p.default, "description": p.description, "choices": p.choices and list(p.choices)}
        for p in recipe.parameters.values()
    ]
    data = {"name": recipe.name, "description": recipe.description, "file": recipe.where, "parameters": parameters, "steps": recipe.steps}
    rows = [[f"  --set {p['name']}={_shown(p['default'])}", str(p["description"])] for p in parameters]
    text = f"{recipe.name}: {recipe.description}\n\n" + (f"parameters:\n{table(rows)}\n\n" if rows else "") + f"file: {recipe.where}"
    emit(data, text, as_json)


def _shown(default: Any) -> str:
    text = ",".join(map(str, default)) if isinstance(default, list) else "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return text if len(text) < 50 else text[:47] + "..."


from tensorsurgeon import cli_read as cli_read  # noqa: E402  # registers inspect, verify and diff, which need main

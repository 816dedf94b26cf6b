"""``surgeon plan`` and ``surgeon transforms``: what would happen, and what there is to choose from."""

from __future__ import annotations

import gc
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tensorsurgeon.cli import completing
from tensorsurgeon.cli.calibrate import calibrates, calibration_options, noting, options_from
from tensorsurgeon.cli.terminal import Place, Sectioned, Stop, at_home, emit, json_option
from tensorsurgeon.errors import NoMatchError, RecipeError, did_you_mean
from tensorsurgeon.tensors.sizes import parse_size

if TYPE_CHECKING:
    from tensorsurgeon.planning.plan import Plan


def transform_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that plan and apply share."""
    for option in reversed((
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", shell_complete=completing.settings,
                     help="Set a parameter of the transform."),
        click.option("--then", multiple=True, callback=at_home, shell_complete=completing.transforms, metavar="NAME",
                     help="Chain another transform; --set KEY=VALUE goes to those that have KEY."),
        click.option("--max-shard-size", default="5GB", metavar="SIZE", show_default=True, help="Largest output shard."),
        click.option("--backend", type=click.Choice(["auto", "fast", "torch"]), default="auto", show_default=True,
                     help="Who computes: compiled CPU kernels or torch; the bits are the same."),
        click.option("--require", multiple=True, shell_complete=completing.engines, metavar="ENGINE[:tp=N]",
                     help="Stop if this engine would not serve the result, such as vllm:tp=4; give it as often as needed."),
        click.option("--ahead", type=click.IntRange(1, 64), default=2, show_default=True,
                     help="Shards of a SOURCE on the Hub that are fetched before they are read; more need more disk."),
        click.option("--keep-source", is_flag=True, help="Keep the shards of a SOURCE on the Hub in its cache."),
    )):  # fmt: skip
        command = option(command)
    return command


def load_chain(transform: str, then: Sequence[str], settings: Sequence[str], backend: str) -> Any:
    """The transforms of a command line, in order, with what ``--set`` gives each of them."""
    from tensorsurgeon.recipes.library import find_recipe, load_transform

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
    return [load_transform(name, {k: v for k, v in given.items() if k in parameters[name]}, backend=backend) for name in names]


def plan_named(
    transform: str,
    then: Sequence[str],
    settings: Sequence[str],
    backend: str,
    source: str,
    max_shard_size: str,
    *,
    calibrated: bool = False,
) -> Plan:
    """The plan that the arguments of a command ask for; ``calibrated``: with data for the steps that can use it."""
    from tensorsurgeon.checkpoint.folder import open_checkpoint
    from tensorsurgeon.ops.on_the_way import for_source
    from tensorsurgeon.planning.plan import make_plan

    chain = load_chain(transform, then, settings, backend)
    if calibrated:
        from tensorsurgeon.ops.calibrating import with_calibration

        chain = with_calibration(chain)
    # The plan stays to the end of the command and holds no cycles: a collector that walks through it again and again takes a
    # third of a run of a few GB. This is the process of the command; one that uses the library keeps its collector as it is.
    gc.disable()
    try:
        checkpoint = open_checkpoint(source)
        return make_plan(
            for_source(chain, checkpoint), checkpoint, max_shard_bytes=parse_size(max_shard_size, "--max-shard-size")
        )
    except NoMatchError as error:
        raise Stop(error, f"; what can be set: surgeon transforms {transform}") from error
    finally:
        gc.freeze()
        gc.enable()


@click.command(cls=Sectioned, short_help="Show what a transform would do; write nothing.")
@click.argument("transform", callback=at_home, shell_complete=completing.transforms)
@click.argument("source", type=Place(readable=False))
@transform_options
@click.option("--workers", type=click.IntRange(1, 256), help="Threads that the dry run of calibration reckons with.")
@json_option
@calibration_options
def plan(
    transform: str,
    source: str,
    settings: tuple[str, ...],
    then: tuple[str, ...],
    max_shard_size: str,
    backend: str,
    require: tuple[str, ...],
    ahead: int,
    keep_source: bool,
    workers: int | None,
    as_json: bool,
    calibration: Mapping[str, Any],
) -> None:
    """Show what TRANSFORM would do to SOURCE, from headers alone: nothing is read but headers, nothing written.

    With --calibration also a dry run of that: text, tokens, model, memory, time. One layer is read for it.

    \b
    surgeon plan quark-w8a8-int8 Qwen3.6-35B-A3B
    surgeon plan ct-w4a16-g32 Qwen3.6-35B-A3B --require vllm:tp=4 --require sglang
    surgeon plan gptq-int4-g128 Qwen3.6-35B-A3B --calibration chats.jsonl
    """
    from tensorsurgeon.engines.advice import advice_as_data, advice_as_text, advise_all, check_requirements
    from tensorsurgeon.planning.report import plan_as_data, plan_as_text
    from tensorsurgeon.running.target import free_bytes

    made = plan_named(transform, then, settings, backend, source, max_shard_size, calibrated=calibrates(calibration, settings))
    check_requirements(made, require)
    advice = advise_all(made)
    rehearsed = _rehearsed(made, calibration, workers)
    # Where the target will lie is not known yet; where the command runs is the best guess, and named as such.
    room = free_bytes(Path.cwd())
    if as_json:
        more = {} if rehearsed is None else {"calibration": rehearsed}
        emit(
            plan_as_data(made, ahead=ahead, keep_source=keep_source)
            | {"free_bytes": room, "engines": advice_as_data(advice)}
            | more,
            "",
            True,
        )
        return
    text = f"{plan_as_text(made, room, ahead=ahead, keep_source=keep_source)}\n\n{advice_as_text(advice)}"
    if rehearsed is not None:
        from tensorsurgeon.calibrate.rehearsal import rehearsal_text

        text += f"\n\n{rehearsal_text(rehearsed)}"
    emit(None, text, False)


def _rehearsed(made: Plan, calibration: Mapping[str, Any], workers: int | None) -> dict[str, Any] | None:
    """A dry run of calibration; None without data for it."""
    if "sources" not in calibration:
        return None
    with noting(None):
        from tensorsurgeon.calibrate.rehearsal import rehearse
        from tensorsurgeon.machine.limits import usable_cores

        given = {key: value for key, value in calibration.items() if key not in ("device", "max_gpu_ram")}
        return rehearse(made, options_from(given), workers=workers or usable_cores())


@click.command(short_help="List transforms, or show one with its parameters.")
@click.argument("name", callback=at_home, shell_complete=completing.transforms, required=False)
@json_option
def transforms(name: str | None, as_json: bool) -> None:
    """List the built-in transforms, or show one with its parameters and steps.

    \b
    surgeon transforms
    surgeon transforms quark-w8a8-int8
    """
    from tensorsurgeon.recipes.library import builtin_names, find_recipe

    if name is None:
        recipes = [find_recipe(n) for n in builtin_names()]
        data: Any = [{"name": r.name, "description": r.description} for r in recipes]
        width = min(100, click.get_current_context().terminal_width or shutil.get_terminal_size().columns)
        wrap = textwrap.TextWrapper(width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
        wrapped = (wrap.fill(r.description) for r in recipes)
        emit(data, "\n".join(f"{r.name}\n{text}" for r, text in zip(recipes, wrapped, strict=True)), as_json)
        return
    recipe = find_recipe(name)
    parameters = [
        {"name": p.name, "default": p.default, "description": p.description, "choices": p.choices and list(p.choices)}
        for p in recipe.parameters.values()
    ]
    data = {
        "name": recipe.name,
        "description": recipe.description,
        "file": recipe.where,
        "parameters": parameters,
        "steps": recipe.steps,
    }
    text = (
        f"{recipe.name}: {recipe.description}\n\n"
        + ("parameters (--set KEY=VALUE; several values with commas):\n" if parameters else "")
        + "".join(map(_parameter_text, parameters))
        + (chr(10) if parameters else "")
        + f"steps: {', '.join(map(_step_text, recipe.steps))}\nfile: {recipe.where}"
    )
    emit(data, text, as_json)


def _parameter_text(parameter: Mapping[str, Any]) -> str:
    """A parameter with its default and choices, whole: each value of a list on a line of its own."""
    from tensorsurgeon.formats.registry import FORMATS

    default, choices = parameter["default"], parameter["choices"]
    if choices is None and parameter["name"] == "format":
        choices = list(FORMATS)
    lines = [f"  {parameter['name']}{f': {said}' if (said := parameter['description']) else ''}"]
    if isinstance(default, list) and len(default) > 1:
        lines += ["      default:", *(f"        {value}" for value in default)]
    else:
        lines.append(f"      default: {_shown(default)}")
    if choices:
        words = ", ".join(map(_shown, choices))
        lines += textwrap.wrap(words, 100, initial_indent="      choices: ", subsequent_indent="        ")
    return "".join(f"{line}\n" for line in lines)


def _step_text(step: Mapping[str, Any]) -> str:
    """A step by the op or transform that it is, and the condition it depends on."""
    what = step.get("use") or next(key for key in step if key not in ("when", "with", "inherit"))
    return f"{what} (when {step['when']})" if "when" in step else str(what)


def _shown(default: Any) -> str:
    if isinstance(default, list):
        text = ",".join(map(str, default)) or "none"
    elif default is None or isinstance(default, bool):
        text = {None: "null", True: "true", False: "false"}[default]
    else:
        text = str(default)
    return text

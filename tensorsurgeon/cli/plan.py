"""``surgeon plan`` and ``surgeon transforms``: what would happen, and what there is to choose from."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tensorsurgeon.cli.terminal import Stop, emit, json_option, note
from tensorsurgeon.errors import NoMatchError, RecipeError, did_you_mean
from tensorsurgeon.tensors.sizes import parse_size

if TYPE_CHECKING:
    from tensorsurgeon.planning.plan import Plan


def transform_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that plan and apply share."""
    for option in (
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a parameter of the transform."),
        click.option("--then", multiple=True, metavar="NAME",
                     help="Chain another transform; --set KEY=VALUE goes to those that have KEY."),
        click.option("--max-shard-size", default="5GB", show_default=True, help="Largest output shard."),
        click.option("--backend", type=click.Choice(["auto", "fast", "torch"]), default="auto", show_default=True,
                     help="Who computes: compiled CPU kernels or torch; the bits are the same."),
        click.option("--require", multiple=True, metavar="ENGINE[:tp=N]",
                     help="Stop if this engine would not serve the result, such as vllm:tp=4; give it as often as needed."),
    ):  # fmt: skip
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

        chain, cannot = with_calibration(chain)
        for why in dict.fromkeys(cannot):
            note(f"note: {why}, whatever data is given")
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


@click.command()
@click.argument("transform")
@click.argument("source", type=click.Path(readable=False))
@transform_options
@json_option
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
    from tensorsurgeon.engines.advice import advice_as_data, advice_as_text, advise_all, check_requirements
    from tensorsurgeon.planning.report import plan_as_data, plan_as_text
    from tensorsurgeon.running.target import free_bytes

    made = plan_named(transform, then, settings, backend, source, max_shard_size)
    check_requirements(made, require)
    advice = advise_all(made)
    # Where the target will lie is not known yet; where the command runs is the best guess, and named as such.
    room = free_bytes(Path.cwd())
    if as_json:
        emit(plan_as_data(made) | {"free_bytes": room, "engines": advice_as_data(advice)}, "", True)
    else:
        emit(None, f"{plan_as_text(made, room)}\n\n{advice_as_text(advice)}", False)


@click.command()
@click.argument("name", required=False)
@json_option
def transforms(name: str | None, as_json: bool) -> None:
    """List the built-in transforms, or show one with its parameters and steps.

    \b
    surgeon transforms
    surgeon transforms quark-w8a8-int8
    """
    from tensorsurgeon.planning.report import table
    from tensorsurgeon.recipes.library import builtin_names, find_recipe

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
    data = {
        "name": recipe.name,
        "description": recipe.description,
        "file": recipe.where,
        "parameters": parameters,
        "steps": recipe.steps,
    }
    rows = [[f"  --set {p['name']}={_shown(p['default'])}", str(p["description"])] for p in parameters]
    text = (
        f"{recipe.name}: {recipe.description}\n\n" + (f"parameters:\n{table(rows)}\n\n" if rows else "") + f"file: {recipe.where}"
    )
    emit(data, text, as_json)


def _shown(default: Any) -> str:
    if isinstance(default, list):
        text = ",".join(map(str, default))
    elif default is None or isinstance(default, bool):
        text = {None: "null", True: "true", False: "false"}[default]
    else:
        text = str(default)
    return text if len(text) < 50 else text[:47] + "..."

"""From a transform's YAML to ops, strictly: unknown keys, wrong types and unused parameters are errors with a line.

description: What it does, in one sentence.
parameters:
  num_bits: {default: 8, description: bits per weight}
steps:
  - use: split-experts
    with: {where: "maybe:{path*}.mlp.experts.gate_up_proj"}
  - quantize: {where: "{path*}.weight", format: ct-packed, num_bits: "${num_bits}"}
    when: "${quantize}"

A step that uses a transform may say ``inherit: true``: the parameters that its ``with`` does not settle are then this
transform's too, and pass through. A parameter of the same name here changes the default, the choices or the text only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from tensorsurgeon.errors import RecipeError, did_you_mean
from tensorsurgeon.recipes.located_yaml import Located, parse_yaml

REFERENCE: Final = re.compile(r"\$\{(\w+)\}")


_MAX_LETTERS = 1 << 20


class Parameter(NamedTuple):
    """A parameter of a transform: its default decides its type."""

    name: str
    default: Any
    description: str
    choices: tuple[Any, ...] | None


class Recipe(NamedTuple):
    """A parsed transform file: what it is for, its parameters and its steps, not yet filled in."""

    name: str
    description: str
    parameters: dict[str, Parameter]
    steps: list[Located]
    where: str


def read_recipe(path: Path, find: Callable[[str, Path], Recipe]) -> Recipe:
    """Parse a transform file; RecipeError names the line of a fault. ``find`` looks up what a step inherits from."""
    where = str(path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_LETTERS + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot be read: {error}", where=where) from error
    if len(text) > _MAX_LETTERS:
        raise RecipeError(f"is longer than the {_MAX_LETTERS} letters that a transform can have", where=where)
    document = parse_yaml(text, where)
    if not isinstance(document, Located):
        raise RecipeError("a transform is a mapping with description and steps", where=where)
    _known_keys(document, ("description", "parameters", "steps"), where)
    description = document.get("description")
    if not isinstance(description, str) or not description.strip():
        raise RecipeError("description is missing: say in a sentence what the transform does", where=where)
    steps = document.get("steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, Located) for step in steps):
        raise RecipeError("steps must be a list of ops", where=where)
    inherited = _inherited(steps, path, find, where)
    parameters = _parameters(document.get("parameters") or Located(), inherited, where)
    _check_references(steps, parameters, inherited, document, where)
    return Recipe(path.stem, " ".join(description.split()), parameters, steps, where)


def _known_keys(found: Located, known: tuple[str, ...], where: str) -> None:
    for key in found:
        if key not in known:
            raise RecipeError(f"unknown key {key!r}{did_you_mean(key, known)}", where=f"{where}:{found.lines[key]}")


def _inherited(steps: list[Located], path: Path, find: Callable[[str, Path], Recipe], where: str) -> dict[str, Parameter]:
    """The parameters of the transforms that steps inherit from, without those that the steps settle."""
    parameters: dict[str, Parameter] = {}
    for step in steps:
        if "inherit" not in step:
            continue
        at = f"{where}:{step.line}"
        if step["inherit"] is not True or not isinstance(step.get("use"), str):
            raise RecipeError("'inherit: true' goes with 'use' only", where=at)
        settled = step.get("with", {})
        inner = find(step["use"], path)
        parameters.update({name: p for name, p in inner.parameters.items() if name not in settled})
    return parameters


def _parameters(found: Any, inherited: Mapping[str, Parameter], where: str) -> dict[str, Parameter]:
    if not isinstance(found, Located) and found:
        raise RecipeError("parameters must be a mapping", where=where)
    parameters = {}
    for name, body in found.items():
        at = f"{where}:{found.lines[name]}"
        base = inherited.get(name)
        if not isinstance(body, Located) or (base is None and ("default" not in body or "description" not in body)):
            raise RecipeError(f"parameter {name!r} needs a default and a description", where=at)
        _known_keys(body, ("default", "description", "choices"), where)
        default, description, choices = base[1:] if base is not None else (None, "", None)
        parameters[name] = Parameter(
            name,
            body.get("default", default),
            str(body.get("description", description)),
            tuple(body["choices"]) if body.get("choices") else choices,
        )
    return {**parameters, **{name: p for name, p in inherited.items() if name not in parameters}}


def _check_references(
    steps: list[Located], parameters: Mapping[str, Parameter], inherited: Iterable[str], document: Located, where: str
) -> None:
    """Every ``${name}`` is a parameter, also in steps that a condition skips, and every parameter is used."""
    used: set[str] = set(inherited)
    for step in steps:
        for name in REFERENCE.findall(repr(step)):
            used.add(name)
            if name not in parameters:
                raise RecipeError(
                    f"${{{name}}} is no parameter{did_you_mean(name, list(parameters))}", where=f"{where}:{step.line}"
                )
    for name in parameters:
        if name not in used:
            line = document["parameters"].lines[name]
            raise RecipeError(f"parameter {name!r} is not used by any step", where=f"{where}:{line}")

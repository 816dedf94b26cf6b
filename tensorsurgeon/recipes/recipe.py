"""From a parsed transform to ops: parameters are filled in, types and conditions checked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from tensorsurgeon.errors import RecipeError, SurgeonError, did_you_mean
from tensorsurgeon.ops.fields import as_type, hints_of
from tensorsurgeon.ops.registry import OPS, op_named
from tensorsurgeon.planning.rewriting import Chain
from tensorsurgeon.recipes.located_yaml import parse_yaml
from tensorsurgeon.recipes.transform_file import REFERENCE, Parameter, Recipe

_MAX_DEPTH = 8


def build(
    recipe: Recipe, given: Mapping[str, Any], find: Callable[[str, Recipe], Recipe], *, depth: int = 0, **overrides: Any
) -> Chain:
    """Fill in the parameters and make the ops; ``find`` looks up what ``use`` names in a recipe.

    ``given`` are values of the right type, or strings from the command line. ``overrides`` are fields set on every
    op that has them (``backend``).
    """
    if depth > _MAX_DEPTH:
        raise RecipeError("transforms use each other in a circle", where=recipe.where)
    values = parameter_values(recipe, given)
    steps = []
    for number, step in enumerate(recipe.steps, 1):
        at = f"{recipe.where}:{step.line}: step {number}"
        words = [key for key in step if key not in ("when", "with", "inherit")]
        if len(words) != 1:
            raise RecipeError(f"a step names one op (or use), found {', '.join(words) or 'none'}", where=at)
        (word,) = words
        if not _holds(_fill(step.get("when", True), values, at), at):
            continue
        body = _fill(step[word], values, at)
        if word == "use":
            arguments = _fill(step.get("with", {}), values, at)
            if not isinstance(body, str) or not isinstance(arguments, dict):
                raise RecipeError("'use' names a transform, and 'with' maps its parameters to values", where=at)
            try:
                inner = find(body, recipe)
                if step.get("inherit"):
                    arguments = {key: values[key] for key in inner.parameters if key in values} | arguments
                for key, value in arguments.items():
                    # One pattern for a list of patterns; only the command line cuts words at commas.
                    if isinstance(value, str) and key in inner.parameters and isinstance(inner.parameters[key].default, list):
                        arguments[key] = [value]
                steps.append(build(inner, arguments, find, depth=depth + 1, **overrides))
            except RecipeError as error:
                # The innermost place is the one to mend.
                raise RecipeError(error.message, where=error.where or f"{at} (use {body})") from error
            continue
        if "with" in step:
            raise RecipeError("'with' goes with 'use' only", where=at)
        if word not in OPS:
            raise RecipeError(f"unknown op {word!r}{did_you_mean(word, [*OPS, 'use'])}", where=at)
        try:
            steps.append(make_op(word, body, overrides))
        except SurgeonError as error:
            raise RecipeError(error.message, where=f"{at} ({word})") from error
    return Chain(steps, recipe.name)


def parameter_values(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults with the given values on top, checked against type and choices."""
    values = {name: parameter.default for name, parameter in recipe.parameters.items()}
    for name, value in given.items():
        if name not in recipe.parameters:
            raise RecipeError(f"{recipe.name} has no parameter {name!r}{did_you_mean(name, list(recipe.parameters))}")
        parameter = recipe.parameters[name]
        values[name] = _typed(parameter, value, recipe.name)
    return values


def _typed(parameter: Parameter, value: Any, recipe: str) -> Any:
    default = parameter.default
    if isinstance(value, str) and not isinstance(default, str):
        value = _from_text(value, default)
    same = type(value) is type(default) or default is None or value is None
    if not same:
        wanted = {bool: "true or false", int: "a whole number", list: "a list (a,b,c)", str: "a word"}.get(type(default), "?")
        raise RecipeError(f"{recipe}: parameter {parameter.name} must be {wanted}, found {value!r}")
    if parameter.choices and value not in parameter.choices:
        raise RecipeError(
            f"{recipe}: parameter {parameter.name} must be one of {', '.join(map(str, parameter.choices))}, found {value!r}"
            + did_you_mean(str(value), list(map(str, parameter.choices)))
        )
    return value


def _from_text(text: str, default: Any) -> Any:
    """A command-line value in the type of the default; the text itself if it is none, which is then refused."""
    if isinstance(default, bool):
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(text.lower(), text)
    if isinstance(default, int):
        return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text
    if default is None:
        # The default says nothing of the type: read the text as YAML would.
        if re.fullmatch(r"[\w.+-]+(,[\w.+-]+)+", text):
            return [parse_yaml(part, "--set") for part in text.split(",")]
        return parse_yaml(text, "--set") if re.fullmatch(r"[\w.+-]+", text) else text
    if isinstance(default, list):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _holds(value: Any, at: str) -> bool:
    """A condition: a boolean, or two words compared (``"${scope} == experts"``)."""
    compared = re.fullmatch(r"\s*(\S+)\s*(==|!=)\s*(\S+)\s*", value) if isinstance(value, str) else None
    if compared:
        left, operator, right = compared.groups()
        return (left == right) is (operator == "==")
    if not isinstance(value, bool):
        raise RecipeError(f"when must be true, false, or a comparison such as ${{scope}} == experts; found {value!r}", where=at)
    return value


def _fill(value: Any, values: Mapping[str, Any], at: str) -> Any:
    """Replace ``${name}``: a whole string takes the value with its type, a list entry that is a list is spliced."""

    def lookup(name: str) -> Any:
        if name not in values:
            raise RecipeError(f"${{{name}}} is no parameter{did_you_mean(name, list(values))}", where=at)
        return values[name]

    if isinstance(value, str):
        whole = REFERENCE.fullmatch(value)
        if whole:
            return lookup(whole.group(1))
        return REFERENCE.sub(lambda found: _word(found.group(1), lookup(found.group(1)), at), value)
    if isinstance(value, list):
        result: list[Any] = []
        for item in value:
            filled = _fill(item, values, at)
            if isinstance(item, str) and isinstance(filled, list):
                result.extend(filled)
            else:
                result.append(filled)
        return result
    if isinstance(value, dict):
        return {key: _fill(item, values, at) for key, item in value.items()}
    return value


def _word(name: str, value: Any, at: str) -> str:
    """A value inside a longer string as YAML writes it: ``${flag} == true`` compares words, and Python says ``True``."""
    if isinstance(value, list | dict):
        raise RecipeError(f"${{{name}}} is a list and cannot be part of a longer text; let it stand alone", where=at)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def make_op(name: str, body: Any, overrides: Mapping[str, Any] | None = None) -> Any:
    """An op from a mapping of its fields, checked against the annotations of its class."""
    cls = op_named(name)
    if not isinstance(body, dict):
        raise RecipeError(f"{name} needs a mapping of its fields, found {body!r}")
    hints = hints_of(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("recipe", True)}
    for key in body:
        if key not in fields:
            raise RecipeError(f"{name} has no field {key!r}{did_you_mean(key, list(fields))}")
    missing = [n for n, f in fields.items() if n not in body and f.default is dataclasses.MISSING]
    if missing:
        raise RecipeError(f"{name} needs {', '.join(missing)}")
    arguments = {key: as_type(value, hints[key], f"{name}: {key}") for key, value in body.items()}
    known = {f.name for f in dataclasses.fields(cls)}
    arguments.update({k: v for k, v in (overrides or {}).items() if k in known})
    return cls(**arguments)

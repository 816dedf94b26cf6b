"""Find named transforms: the YAML files that ship with the package, or one of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorsurgeon.errors import RecipeError, did_you_mean
from tensorsurgeon.planning.rewriting import Chain
from tensorsurgeon.recipes.recipe import build
from tensorsurgeon.recipes.transform_file import Recipe, read_recipe

TRANSFORM_SUFFIXES = (".yaml", ".yml")
"""Of files that hold a transform."""


def transforms_folder() -> Path:
    """Where the built-in transforms lie: beside the code in a wheel, at the top of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "transforms"
    return installed if installed.is_dir() else package.parent / "transforms"


def builtin_names() -> list[str]:
    """The names of the built-in transforms."""
    return sorted(path.stem for path in transforms_folder().glob("*.yaml"))


def find_recipe(name: str) -> Recipe:
    """The recipe of a built-in name or a YAML file; RecipeError with near matches if there is none."""
    path = Path(name)
    if path.suffix in TRANSFORM_SUFFIXES or "/" in name:
        if not path.is_file():
            raise RecipeError(f"{name}: no such transform file")
        return read_recipe(path, _beside)
    builtin = transforms_folder() / f"{name}.yaml"
    if not builtin.is_file():
        raise RecipeError(f"unknown transform {name!r}{did_you_mean(name, builtin_names())}")
    return read_recipe(builtin, _beside)


def load_transform(name: str, parameters: Mapping[str, Any] | None = None, **overrides: Any) -> Chain:
    """A named transform or YAML file, ready to plan; ``parameters`` as ``--set`` gives them."""
    recipe = find_recipe(name)
    return build(recipe, parameters or {}, _find_beside, **overrides)


def _find_beside(name: str, user: Recipe) -> Recipe:
    """What ``use`` names: a file is looked up beside the file that uses it."""
    return _beside(name, Path(user.where))


def _beside(name: str, user: Path) -> Recipe:
    path = Path(name)
    if path.suffix in TRANSFORM_SUFFIXES and not path.is_absolute():
        return find_recipe(str(user.parent / path))
    return find_recipe(name)

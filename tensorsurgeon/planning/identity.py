"""What a step is, in words that are the same in every process: by them a stopped run is known again.

A ``repr`` is for readers: it may leave out the middle of a long array, or name an address in memory.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import re
from collections.abc import Mapping, Set
from typing import Any, Final

import numpy as np

from tensorsurgeon.errors import RecipeError
from tensorsurgeon.planning.rewriting import Transform

_ADDRESS: Final = re.compile(r"\bat 0x[0-9a-fA-F]+")


def step_identity(step: Transform) -> str:
    """A step's class and settings; RecipeError where a setting has no words of its own.

    A step may say ``identity()`` itself. Of a dataclass every field counts that a recipe can set: those with
    ``metadata={"recipe": False}`` say how something is computed, and change no byte.
    """
    own = getattr(type(step), "identity", None)
    if own is not None:
        return f"{type(step).__name__} {own(step)}"
    if not dataclasses.is_dataclass(step) and type(step).__repr__ is object.__repr__:
        raise RecipeError(
            f"{type(step).__name__} has no repr, by which a stopped run is known again; make it a frozen dataclass, "
            "or give it a __repr__ that says its settings"
        )
    return _words(step, type(step).__name__)


def _words(value: Any, where: str) -> str:
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            return repr(value)
        case enum.Enum():
            return f"{type(value).__name__}.{value.name}"
        case np.ndarray() | np.generic():
            array = np.ascontiguousarray(value)
            return f"array {array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
        case Mapping():
            return "{" + ", ".join(f"{_words(k, where)}: {_words(v, where)}" for k, v in value.items()) + "}"
        case tuple() | list():
            return "[" + ", ".join(_words(item, where) for item in value) + "]"
        case Set():
            return "{" + ", ".join(sorted(_words(item, where) for item in value)) + "}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        counted = [field for field in dataclasses.fields(value) if field.metadata.get("recipe", True)]
        fields = (f"{field.name}={_words(getattr(value, field.name), f'{where}.{field.name}')}" for field in counted)
        return f"{type(value).__qualname__}({', '.join(fields)})"
    said = repr(value)
    if _ADDRESS.search(said):
        raise RecipeError(
            f"{where}: a {type(value).__name__} says no settings, by which a stopped run is known again; make it a frozen "
            "dataclass, or give the step an identity() that says them"
        )
    return said

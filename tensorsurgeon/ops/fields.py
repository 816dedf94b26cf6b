"""Fields of an op, with the types that its class says: the same rules for YAML and for Python.

A list may stand for a tuple, and one word for a tuple of one. What is neither is told when the op is made, and not by whatever
stumbles over it later.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Final, Literal, TypeVar

from tensorsurgeon.errors import RecipeError
from tensorsurgeon.planning.rewriting import op_name

Op = TypeVar("Op")

# No size of a tensor, and too large for a message.
_HUGE: Final = 1 << 63
_hints: dict[type[Any], dict[str, Any]] = {}


def typed_fields(cls: type[Op]) -> type[Op]:
    """Class decorator, inside ``dataclass``: fields are typed before the op checks what they say."""
    check = getattr(cls, "__post_init__", None)

    def settle_and_check(op: Any) -> None:
        _settle(op)
        if check is not None:
            check(op)

    cls.__post_init__ = settle_and_check  # type: ignore[attr-defined]
    return cls


def _settle(op: Any) -> None:
    name = op_name(op)
    hints = hints_of(type(op))
    for field in dataclasses.fields(op):
        value = getattr(op, field.name)
        object.__setattr__(op, field.name, as_type(value, hints[field.name], f"{name}: {field.name}"))


def hints_of(cls: type[Any]) -> dict[str, Any]:
    """The types of a class's fields."""
    found = _hints.get(cls)
    if found is None:
        found = _hints[cls] = typing.get_type_hints(cls)
    return found


def as_type(value: Any, hint: Any, what: str) -> Any:
    """``value`` as a field of this type; RecipeError, which says ``what`` it was to be, if it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return as_type(value, next(a for a in arguments if a is not type(None)), what)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(as_type(item, arguments[0], what) for item in items)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise RecipeError(f"{what} must be one of {', '.join(map(str, arguments))}, found {_shown(value)}")
        return value
    if isinstance(value, bool) is not (hint is bool):
        raise RecipeError(f"{what} must be {_wanted(hint)}, found {_shown(value)}")
    is_huge = isinstance(value, int) and abs(value) >= _HUGE
    if hint is str and isinstance(value, int) and not is_huge:
        return str(value)
    if is_huge or not isinstance(value, hint):
        raise RecipeError(f"{what} must be {_wanted(hint)}, found {_shown(value)}")
    return value


def _wanted(hint: Any) -> str:
    return {bool: "true or false", int: "a whole number", str: "a word"}.get(hint, str(hint))


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:
        # A number of thousands of digits.
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else text[:77] + "..."

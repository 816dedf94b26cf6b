"""Is a JSON document made as this program makes it? Said once for each file, so that whoever reads it may believe it.

A form is a type (``int`` is no truth value, ``float`` may be whole, text can be written), None, a tuple of forms of which one
holds, a list of one form (and how many at least), ``{str: form}`` for any keys, or a mapping of the keys that are needed;
``"key?"`` may be absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def require_form(value: Any, form: Any, where: str = "it") -> None:
    """ValueError, with the place of it, for a value of another form."""
    if isinstance(form, tuple):
        if not any(_fits(value, one, where) for one in form):
            raise ValueError(f"{where} is {_shown(value)}")
    elif isinstance(form, list):
        if not isinstance(value, list) or len(value) < (form[1] if len(form) > 1 else 0):
            raise ValueError(f"{where} is {_shown(value)}")
        for number, item in enumerate(value):
            require_form(item, form[0], f"{where}[{number}]")
    elif isinstance(form, dict):
        _require_mapping(value, form, where)
    elif not _is_plain(value, form):
        raise ValueError(f"{where} is {_shown(value)}")


def _require_mapping(value: Any, form: Mapping[Any, Any], where: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} holds no names")  # noqa: TRY004  # a fault of the document
    if str in form:
        for key, item in value.items():
            require_form(key, str, f"a name in {where}")
            require_form(item, form[str], f"{where}.{key}")
        return
    for key, inner in form.items():
        name = key.removesuffix("?")
        if name in value:
            require_form(value[name], inner, f"{where}.{name}")
        elif name == key:
            raise ValueError(f"{where} has no {name}")


def _fits(value: Any, form: Any, where: str) -> bool:
    try:
        require_form(value, form, where)
    except ValueError:
        return False
    return True


def _is_plain(value: Any, form: Any) -> bool:
    if form is None:
        return value is None
    if form is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if form is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if form is str:
        return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, form)


def _shown(value: Any) -> str:
    return ascii(value)[:60]

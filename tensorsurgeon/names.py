"""Match tensor names and fill name templates.

A pattern is one of

- a template: ``model.{path*}.experts.{e}.up_proj.weight``: ``{x}`` is one dotted part (or a piece of one), ``{x*}``
  one or more parts; everything else is literal; the same name twice must match the same text;
- a regular expression: ``re:model\\.layers\\.(?P<n>\\d+)\\..*``, matched against the whole name;

each optionally behind ``maybe:``, which allows it to match nothing. All other patterns must match something: a typo
that selects nothing is the commonest way to ship an unquantized model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tensorsurgeon.errors import NoMatchError, RecipeError

_FIELD = re.compile(r"\{([A-Za-z_]\w*)(\*?)\}")
_MAYBE = "maybe:"
_REGEX = "re:"


class Pattern(NamedTuple):
    """One parsed pattern; ``text`` is what the user wrote."""

    text: str
    regex: re.Pattern[str]
    may_be_absent: bool

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Compile a template or ``re:`` expression; RecipeError says what is wrong with it."""
        if not isinstance(text, str) or not text:
            raise RecipeError(f"a pattern must be a non-empty string, found {text!r}")
        body = text.removeprefix(_MAYBE)
        source = body.removeprefix(_REGEX) if body.startswith(_REGEX) else _template_regex(body)
        try:
            return cls(text, re.compile(source), body != text)
        except re.error as error:
            raise RecipeError(f"pattern {text!r} is not a valid expression: {error}") from error

    def match(self, name: str) -> dict[str, str] | None:
        """The fields of a match with the whole name, or None."""
        found = self.regex.fullmatch(name)
        return None if found is None else found.groupdict()


def _template_regex(template: str) -> str:
    parts = []
    seen: set[str] = set()
    position = 0
    for field in _FIELD.finditer(template):
        parts.append(re.escape(template[position : field.start()]))
        name, star = field.groups()
        if name in seen:
            parts.append(f"(?P={name})")
        else:
            seen.add(name)
            parts.append(f"(?P<{name}>{'.+' if star else '[^.]+'})")
        position = field.end()
    rest = template[position:]
    if "{" in rest or "}" in rest:
        raise RecipeError(f"pattern {template!r}: braces must hold a field such as {{path*}} or {{e}}")
    parts.append(re.escape(rest))
    return "".join(parts)


class Selector:
    """Names that match any of ``where`` and none of ``exclude``."""

    def __init__(self, where: Sequence[str], exclude: Sequence[str] = ()) -> None:
        if not where:
            raise RecipeError("a selector needs at least one pattern")
        self.where = tuple(map(Pattern.parse, where))
        self.exclude = tuple(map(Pattern.parse, exclude))

    def select(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Matching names in order, with the fields of the first pattern that matched.

        Raises NoMatchError for a pattern, of either list, that matches no name and does not say ``maybe:``.
        """
        names = list(names)
        self._check_matches(names)
        excluded = _any_of(self.exclude)
        chosen: dict[str, dict[str, str]] = {}
        for name in names:
            if any(e.fullmatch(name) for e in excluded):
                continue
            for pattern in self.where:
                found = pattern.regex.fullmatch(name)
                if found is not None:
                    chosen[name] = found.groupdict()
                    break
        if not chosen and not all(p.may_be_absent for p in self.where):
            raise NoMatchError(
                f"every tensor that {_listed(self.where)} selects is also excluded by {_listed(self.exclude)}"
            )
        return chosen

    def _check_matches(self, names: list[str]) -> None:
        for pattern in (*self.where, *self.exclude):
            if not pattern.may_be_absent and not any(map(pattern.regex.fullmatch, names)):
                raise NoMatchError(no_match_message(pattern, names))


def _any_of(patterns: Sequence[Pattern]) -> list[re.Pattern[str]]:
    """Few expressions for a long list: matching 200 patterns with 31,000 names one by one would take seconds."""
    # A name group may occur once per expression; a pattern that refers back to its own stays alone.
    alone = [p.regex for p in patterns if "(?P=" in p.regex.pattern]
    sources = [re.sub(r"\(\?P<\w+>", "(?:", p.regex.pattern) for p in patterns if "(?P=" not in p.regex.pattern]
    return alone + ([re.compile("|".join(f"(?:{s})" for s in sources))] if sources else [])


def _listed(patterns: Sequence[Pattern]) -> str:
    return ", ".join(repr(p.text) for p in patterns)


def no_match_message(pattern: Pattern, names: Sequence[str]) -> str:
    """Say that a pattern matched nothing, with the tensor names nearest to it."""
    literal = pattern.text.removeprefix(_MAYBE).removeprefix(_REGEX).replace("\\", "")
    # Names that differ only in their numbers look alike to a reader, and comparing 30,000 would take seconds.
    distinct = list({re.sub(r"\d+", "0", name): name for name in reversed(names)}.values())
    near = difflib.get_close_matches(literal, distinct, n=3, cutoff=0.4)
    hint = f"; the nearest names are {', '.join(near)}" if near else f"; it was compared with {len(names)} names"
    return (
        f"pattern {pattern.text!r} matches no tensor{hint}. "
        f"If that is as it should be for some models, write {_MAYBE + pattern.text!r}"
    )


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Put matched fields into an output template; unknown fields are RecipeErrors."""

    def value(field: re.Match[str]) -> str:
        name = field.group(1)
        if name not in fields:
            known = ", ".join(f"{{{k}}}" for k in fields) or "none"
            raise RecipeError(f"template {template!r} uses {{{name}}}, which the pattern does not define (fields: {known})")
        return fields[name]

    return _FIELD.sub(value, template)


_NUMBER = re.compile(r"(\d+)")


def natural_key(name: str) -> tuple[str | int, ...]:
    """Sort key under which ``layers.2`` comes before ``layers.10``, whatever shard a tensor lay in."""
    # split() alternates text and digits, so that equal positions always compare equal types.
    parts: list[str | int] = list(_NUMBER.split(name))
    parts[1::2] = map(int, parts[1::2])
    return tuple(parts)

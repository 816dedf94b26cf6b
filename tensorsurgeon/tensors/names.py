"""Match tensor names and fill name templates.

A pattern is one of

- a template: ``model.{path*}.experts.{e}.up_proj.weight``: ``{x}`` is one dotted part (or a piece of one), ``{x*}``
  one or more parts; everything else is literal; the same name twice must match the same text;
- a regular expression: ``re:model\\.layers\\.(?P<n>\\d+)\\..*``, matched against the whole name;
- a role: ``role:expert``, ``role:mtp.attention``: what a tensor is for, whatever its family calls it (``models/roles.py``
  has the words); its fields are ``{module}`` and ``{leaf}``;

each optionally behind ``maybe:``, which allows it to match nothing. All other patterns must match something: a typo
that selects nothing is the commonest way to ship an unquantized model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from tensorsurgeon.errors import NoMatchError, RecipeError

_FIELD = re.compile(r"\{([A-Za-z_]\w*)(\*?)\}")
_MAYBE = "maybe:"
_REGEX = "re:"
_ROLE = "role:"
_ANY_NAME = re.compile(r"(?:(?P<module>.+)\.)?(?P<leaf>[^.]+)")

Chooser = Callable[..., Callable[[str], bool]]
"""From roles to a test for names that have any of them. This room knows no models, so whoever selects by role hands it in."""


class Pattern(NamedTuple):
    """One parsed pattern; ``text`` is what the user wrote."""

    text: str
    regex: re.Pattern[str]
    may_be_absent: bool
    # The longest literal of a template: a name without it cannot match, which is quick to see.
    literal: str = ""
    # What stands behind ``role:``; such a pattern matches no name by itself.
    role: str = ""

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Compile a template or ``re:`` expression; RecipeError says what is wrong with it."""
        if not isinstance(text, str) or not text:
            raise RecipeError(f"a pattern must be a non-empty string, found {text!r}")
        body = text.removeprefix(_MAYBE)
        if body in ("", _REGEX, _ROLE):
            raise RecipeError(f"pattern {text!r} is empty")
        if body.startswith(_ROLE):
            return cls(text, _ANY_NAME, body != text, role=body.removeprefix(_ROLE))
        is_regex = body.startswith(_REGEX)
        source = body.removeprefix(_REGEX) if is_regex else _template_regex(body)
        literal = "" if is_regex else max(_FIELD.sub("\0", body).split("\0"), key=len)
        try:
            return cls(text, re.compile(source), body != text, literal)
        except re.error as error:
            raise RecipeError(f"pattern {text!r} is not a valid expression: {error}") from error

    def match(self, name: str) -> dict[str, str] | None:
        """The fields of a match with the whole name, or None; a role is no name, and matches none here."""
        found = None if self.role else self.regex.fullmatch(name)
        return None if found is None else _fields(found)

    def tested(self, choose: Chooser | None) -> Callable[[str], re.Match[str] | bool | None]:
        """A test for names; ``choose`` says which of them have a role."""
        if not self.role:
            return self.regex.fullmatch
        if choose is None:
            raise RecipeError(f"pattern {self.text!r}: roles are known of a checkpoint's tensors only")
        return choose(self.role)


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
        if isinstance(where, str) or isinstance(exclude, str):
            # A string is a sequence of letters, each of which would pass for a pattern.
            raise RecipeError(f"patterns are given as a tuple, such as ({where!r},)")
        self.where = tuple(map(Pattern.parse, where))
        self.exclude = tuple(map(Pattern.parse, exclude))

    def select(self, names: Iterable[str], choose: Chooser | None = None) -> dict[str, dict[str, str]]:
        """Matching names in order, with the fields of the first pattern that matched.

        Raises NoMatchError for a pattern, of either list, that matches no name and does not say ``maybe:``. ``choose``
        is needed for patterns that name roles.
        """
        matches = self._matches(names, choose)
        return {name: _fields(found if isinstance(found, re.Match) else _ANY_NAME.fullmatch(name)) for name, found in matches}

    def names(self, names: Iterable[str], choose: Chooser | None = None) -> list[str]:
        """Like ``select`` where the fields are of no interest."""
        return [name for name, _ in self._matches(names, choose)]

    def _matches(self, names: Iterable[str], choose: Chooser | None) -> list[tuple[str, re.Match[str] | bool]]:
        names = list(names)
        for pattern in (*self.where, *self.exclude):
            if not pattern.may_be_absent and not any(map(pattern.tested(choose), names)):
                raise NoMatchError(no_match_message(pattern, names))
        wanted = [(pattern.literal, pattern.tested(choose)) for pattern in self.where]
        excluded: list[tuple[str, Callable[[str], object]]] = []
        excluded += [(pattern.literal, pattern.regex.fullmatch) for pattern in self.exclude if not pattern.role]
        roles = [pattern.role for pattern in self.exclude if pattern.role]
        if roles and choose is not None:
            excluded.append(("", choose(*roles)))
        chosen: list[tuple[str, re.Match[str] | bool]] = []
        for name in names:
            for literal, match in wanted:
                found = match(name) if literal in name else None
                if found:
                    for other, excludes in excluded:
                        if other in name and excludes(name):
                            break
                    else:
                        chosen.append((name, found))
                    break
        if not chosen and not all(p.may_be_absent for p in self.where):
            raise NoMatchError(f"every tensor that {_listed(self.where)} selects is also excluded by {_listed(self.exclude)}")
        return chosen


def _fields(found: re.Match[str] | None) -> dict[str, str]:
    """The named groups that took part in the match: an optional one that did not has no text to fill in."""
    if found is None:
        return {}
    fields = found.groupdict()
    return {k: v for k, v in fields.items() if v is not None} if None in fields.values() else fields


def _listed(patterns: Sequence[Pattern]) -> str:
    return ", ".join(repr(p.text) for p in patterns)


def no_match_message(pattern: Pattern, names: Sequence[str]) -> str:
    """Say that a pattern matched nothing, with the tensor names nearest to it."""
    if pattern.role:
        return (
            f"no tensor has the role of {pattern.text!r}. If that is as it should be for some models, write "
            f"{_MAYBE + pattern.text!r}"
        )
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
    try:
        return _format_string(template).format_map(fields)
    except KeyError as error:
        known = ", ".join(f"{{{k}}}" for k in fields) or "none"
        raise RecipeError(
            f"template {template!r} uses {{{error.args[0]}}}, which the pattern does not define (fields: {known})"
        ) from error


@cache
def _format_string(template: str) -> str:
    """A checked template as Python's own format string; a run fills the same few templates 60,000 times."""
    literal = _FIELD.sub("", template)
    if "{" in literal or "}" in literal:
        raise RecipeError(f"template {template!r}: braces must hold a field such as {{path}}")
    return _FIELD.sub(r"{\1}", template)


# At most 18 digits at once: Python refuses to convert numbers of thousands of digits.
_NUMBER = re.compile(r"([0-9]{1,18})")


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sort key under which ``layers.2`` comes before ``layers.10``, whatever shard a tensor lay in.

    The name itself comes last, for ``layers.2`` and ``layers.02`` differ in nothing else.
    """
    # split() alternates text and digits, so that equal positions always compare equal types.
    parts: list[str | int] = list(_NUMBER.split(name))
    parts[1::2] = map(int, parts[1::2])
    return tuple(parts), name


def canonical_order(names: Iterable[str]) -> list[str]:
    """Names in natural order of their modules, then of their last parts.

    The order of every output, so that it depends neither on the source's shards nor on whether it was fused.
    """
    modules: dict[str, list[str]] = {}
    for name in names:
        module = name.rpartition(".")[0]
        if module in modules:
            modules[module].append(name)
        else:
            modules[module] = [name]
    ordered: list[str] = []
    for module in sorted(modules, key=_NaturalKeys()):
        # One module's names differ in their last parts only.
        ordered += sorted(modules[module])
    return ordered


class _NaturalKeys:
    """``natural_key`` for many paths of one model, which end alike and begin alike: each half is split once."""

    def __init__(self) -> None:
        self._halves: dict[str, tuple[str | int, ...]] = {}

    def __call__(self, path: str) -> tuple[tuple[str | int, ...], str]:
        begin = path.rsplit(".", 2)[0]
        end = path[len(begin) :]
        if not end:
            return natural_key(path)
        head, tail = self._half(begin), self._half(end)
        # The cut is at a dot, so that it parts no number.
        return (*head[:-1], head[-1] + tail[0], *tail[1:]), path  # type: ignore[operator]

    def _half(self, text: str) -> tuple[str | int, ...]:
        found = self._halves.get(text)
        if found is None:
            found = self._halves[text] = natural_key(text)[0]
        return found

"""Regular expressions out of a stranger's config: they mean what they mean to engines, and none can run for ever.

Engines match with Python's ``re``, whose time can double with every letter of a name. ``regex`` reads the same syntax and
stops when told to. Expressions that are meant take microseconds; what takes milliseconds is counted, and a second of that
within ten is refused.
"""

from __future__ import annotations

import re
import threading
import time
import warnings
from typing import Any, Final

import regex

from tensorsurgeon.errors import ConfigError

_MAX_LETTERS: Final = 10_000
_SLOW_SECONDS: Final = 0.002
_BUDGET_SECONDS: Final = 1.0
_WINDOW_SECONDS: Final = 10.0


class _Slowness:
    """What slow matches have taken lately, in all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = 0.0
        self._spent = 0.0

    def left(self) -> float:
        with self._lock:
            if time.monotonic() - self._began > _WINDOW_SECONDS:
                self._began, self._spent = time.monotonic(), 0.0
            return max(_BUDGET_SECONDS - self._spent, _SLOW_SECONDS)

    def add(self, seconds: float) -> bool:
        """Whether the budget is spent with this."""
        with self._lock:
            self._spent += seconds
            return self._spent > _BUDGET_SECONDS


_SLOWNESS: Final = _Slowness()


class Expression:
    """A compiled expression; ``re.error`` where Python's own ``re`` would not take it either."""

    __slots__ = ("_compiled", "text")

    def __init__(self, text: str) -> None:
        if len(text) > _MAX_LETTERS:
            raise re.error(f"{len(text)} letters are no expression that names modules")
        self.text = text
        try:
            with warnings.catch_warnings():
                # Of sets that a later Python may read otherwise: nothing that a reader of the config can do about.
                warnings.simplefilter("ignore", FutureWarning)
                re.compile(text)
                self._compiled = regex.compile(text, regex.VERSION0)
        except (regex.error, RecursionError, OverflowError) as error:
            raise re.error(str(error)) from error

    @classmethod
    def of_config(cls, text: str) -> Expression:
        """An expression that a config names modules by; ConfigError if it is none."""
        try:
            return cls(text)
        except re.error as error:
            raise ConfigError(f"quantization_config: {text[:100]!r} is not a valid expression: {error}") from error

    def match(self, name: str) -> Any:
        """As ``re.match``: from the beginning; ConfigError if it takes too long."""
        return self._run(self._compiled.match, name)

    def search(self, name: str) -> Any:
        """As ``re.search``: anywhere; ConfigError if it takes too long."""
        return self._run(self._compiled.search, name)

    def fullmatch(self, name: str) -> Any:
        """As ``re.fullmatch``: the whole name; ConfigError if it takes too long."""
        return self._run(self._compiled.fullmatch, name)

    def _run(self, how: Any, name: str) -> Any:
        began = time.thread_time()
        try:
            found = how(name, timeout=_SLOWNESS.left())
        except TimeoutError as error:
            raise self._too_slow(name) from error
        spent = time.thread_time() - began
        if spent > _SLOW_SECONDS and _SLOWNESS.add(spent):
            raise self._too_slow(name)
        return found

    def _too_slow(self, name: str) -> ConfigError:
        return ConfigError(
            f"the expression {self.text[:100]!r} takes too long on {name[:100]!r}; it nests repetitions, and no tool could use it"
        )

"""What a verification finds: faults make a checkpoint unsound, notes are worth knowing."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """Something that makes readers fail, or read other weights than were meant.

    ``kind`` is a stable word for scripts, ``where`` a tensor, module, file or config key, ``message`` says what is
    wrong and what was expected.
    """

    kind: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True, slots=True, order=True)
class Note:
    """Something odd that no reader stumbles over, or that this program cannot judge."""

    kind: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class Findings:
    """Collects what checks find, from any thread; the order is made stable when they are read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: dict[Fault, None] = {}
        self._notes: dict[Note, None] = {}

    def fault(self, kind: str, where: str, message: str) -> None:
        """Add a fault; the same one twice counts once."""
        with self._lock:
            self._faults[Fault(kind, where, message)] = None

    def note(self, kind: str, where: str, message: str) -> None:
        """Add a note; the same one twice counts once."""
        with self._lock:
            self._notes[Note(kind, where, message)] = None

    def excuse(self, kind: str, where: Collection[str], why: str) -> None:
        """Make faults of this kind at these places notes, since what was found later explains them."""
        with self._lock:
            for fault in [found for found in self._faults if found.kind == kind and found.where in where]:
                del self._faults[fault]
                self._notes[Note(kind, fault.where, f"{fault.message}; {why}")] = None

    @property
    def faults(self) -> tuple[Fault, ...]:
        """All faults, by kind and name."""
        return tuple(sorted(self._faults))

    @property
    def notes(self) -> tuple[Note, ...]:
        """All notes, by kind and name."""
        return tuple(sorted(self._notes))

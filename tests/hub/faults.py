"""Faults that the Hub of the tests injects, each for as many requests as it says."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What happens to requests whose ``METHOD path`` a pattern finds.

    ``status`` answers with it and no content, ``code`` is the Hub's own word for the error. ``cut_after`` closes the connection
    after so many bytes of the body. ``flip`` changes a byte of the body at this place of the file. ``stall`` sends nothing for
    so many seconds.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    code: str | None = None
    message: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    flip: int | None = None
    stall: float | None = None
    # Answer the whole file to a request for a range.
    ignore_range: bool = False


class Faults:
    """The faults that are still to happen, and those that did."""

    def __init__(self) -> None:
        self._waiting: list[Fault] = []
        self.happened: list[str] = []
        self._lock = threading.Lock()

    def add(self, pattern: str, **what: object) -> None:
        self._waiting.append(Fault(pattern, **what))  # type: ignore[arg-type]

    def take(self, request: str) -> Fault | None:
        with self._lock:
            for fault in self._waiting:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    self.happened.append(request)
                    return fault
        return None

    def clear(self) -> None:
        self._waiting = []

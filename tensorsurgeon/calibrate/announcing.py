"""Where a calibrated run is, for whoever shows it: told through the log, at a level that nobody else listens to."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


class Announced(NamedTuple):
    """``done`` of ``total`` layers are through, and ``what`` is being done; None where only what is done has changed."""

    done: int | None
    total: int | None
    what: str


def announce(done: int | None, total: int | None, what: str) -> None:
    """Say where the run is."""
    logger.debug("%s", what, extra={"announced": Announced(done, total, what)})


def announced(record: logging.LogRecord) -> Announced | None:
    """What a log record announces; None for any other."""
    found: Any = getattr(record, "announced", None)
    return found if isinstance(found, Announced) else None

"""The folder for compiled code. What lies in it is executed: it must be one that nobody else can write."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from tensorsurgeon.quant.loops.identity import identity

log = logging.getLogger(__name__)

_KEPT_SECONDS = 30 * 24 * 3600


@cache
def folder() -> Path | None:
    """The folder for code under this process's identity, made if need be; None where none can be had.

    In the place that ``TENSORSURGEON_CACHE`` names, or else in the user's cache directory, or else in the temporary one.
    """
    name = identity()
    if name is None:
        log.warning("compiled code cannot be kept (no sources to tell its versions apart by): every run compiles it again")
        return None
    refused = []
    for place in _places():
        reason = _why_not_private(place)
        is_new = reason is None and not (place / name).exists()
        reason = reason or _why_not_private(place / name)
        if reason is None:
            if is_new:
                _remove_old(place)
            return place / name
        refused.append(f"{place}: {reason}")
    log.warning(
        "compiled code cannot be kept (%s): every run compiles it again; TENSORSURGEON_CACHE can name a folder of your own",
        "; ".join(refused) or "no folder was found",
    )
    return None


def _places() -> Iterator[Path]:
    named = os.environ.get("TENSORSURGEON_CACHE")
    if named:
        yield Path(named)
        return
    with suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tensorsurgeon"
    with suppress(OSError):  # none that can be written
        yield Path(tempfile.gettempdir()) / f"tensorsurgeon-{os.getuid() if hasattr(os, 'getuid') else 'kernels'}"


def _why_not_private(place: Path) -> str | None:
    """Why a folder, which is made if it is not there, is not for this user alone; None if it is."""
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.lstat()
    except OSError as error:
        return f"cannot be made: {error.strerror}"
    if place.is_symlink() or not place.is_dir():
        return "is a link, or no folder"
    if hasattr(os, "getuid"):
        if found.st_uid != os.getuid():
            return "belongs to someone else"
        if found.st_mode & 0o022:
            return "others may write it (chmod go-w)"
    return None if os.access(place, os.W_OK) else "cannot be written"


def _remove_old(place: Path) -> None:
    """Remove code of other versions that nothing was added to for a month: at worst it is compiled again."""
    with suppress(OSError):
        for other in place.iterdir():
            if re.fullmatch("[0-9a-f]{32}", other.name) and time.time() - other.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(other, ignore_errors=True)

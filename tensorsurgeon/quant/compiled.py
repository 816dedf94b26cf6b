"""How the package compiles its loops: numba, without fastmath, with the GIL released, cached on disk.

Import this module only where a kernel is about to run: numba costs 0.2 s, and planning never needs it.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import config as numba_config

F = TypeVar("F", bound=Callable[..., Any])
log = logging.getLogger(__name__)


def kernel(function: F) -> F:
    """Compile ``function`` at its first call for each set of argument types, and keep the machine code on disk.

    numba puts the cache beside the source, or in the user's cache directory where that is read-only
    (``NUMBA_CACHE_DIR`` overrides both). Where neither can be written, as in a container without a home, the code
    goes to the temporary directory: compiling again in every process would cost more than quantizing.

    ``error_model="numpy"`` divides as IEEE says instead of testing for zero, which would keep the loops scalar.
    ``fastmath`` stays off: it divides by multiplying with a reciprocal, which gives other codes than the tools'.
    """
    compile_ = numba.njit(nogil=True, cache=True, error_model="numpy")
    try:
        return cast("F", compile_(function))
    except RuntimeError as error:  # numba: "cannot cache function ...: no locator available"
        folder = None if numba_config.CACHE_DIR else _temporary_cache()  # type: ignore[attr-defined]
        if folder is None:
            log.warning("%s; compiling in every process", error)
            return cast("F", numba.njit(nogil=True, error_model="numpy")(function))
        log.info("%s; compiled kernels go to %s", error, folder)
        numba_config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]
        return cast("F", compile_(function))


def _temporary_cache() -> Path | None:
    """A folder in the temporary directory that nobody else can write; None if there is none.

    numba unpickles what it finds in its cache, so a folder that another user made is never used.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"tensorsurgeon-numba-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    owned = not hasattr(os, "getuid") or (found.st_uid == user and not found.st_mode & 0o022)
    return folder if owned and folder.is_dir() and not folder.is_symlink() else None


def inline(function: F) -> F:
    """Compile a piece of a kernel into its callers.

    numba notices a change of the file whose kernels it caches, and of no other: touch the callers' files too.
    """
    return cast("F", numba.njit(nogil=True, error_model="numpy", inline="never")(function))

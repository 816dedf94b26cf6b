"""How the package compiles its loops: numba, without fastmath, with the GIL released, cached on disk.

Import this module only where a kernel is about to run: numba costs 0.2 s, and planning never needs it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba  # type: ignore[import-untyped]
from numba.core import config as numba_config  # type: ignore[import-untyped]

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
        compiled: F = compile_(function)
    except RuntimeError as error:  # numba: "cannot cache function ...: no locator available"
        if numba_config.CACHE_DIR:
            raise
        numba_config.CACHE_DIR = str(Path(tempfile.gettempdir()) / "tensorsurgeon-numba")
        log.info("%s; compiled kernels go to %s", error, numba_config.CACHE_DIR)
        compiled = compile_(function)
    return compiled


def inline(function: F) -> F:
    """Compile a piece of a kernel into its callers.

    It belongs in the file of those callers: numba notices a change of the file that it caches, and of no other.
    """
    compiled: F = numba.njit(nogil=True, error_model="numpy", inline="never")(function)
    return compiled

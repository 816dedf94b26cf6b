"""How the package compiles its loops: ``numba.njit`` without fastmath, kept between processes by numba's own cache.

Callers import the modules of kernels where they call them: importing numba takes longer than planning a 3 GB conversion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numba

from tensorsurgeon.quant.loops.kept import keep

F = TypeVar("F", bound=Callable[..., Any])

# ``error_model="numpy"`` divides as IEEE says instead of testing for zero, which would keep the loops scalar. ``fastmath``
# stays off: it divides by multiplying with a reciprocal, which gives other codes than the tools'. Without numba's runtime
# (``_nrt``) an allocation is a compile error, and kept code runs without it (``kept.py``).
_OPTIONS: Final[dict[str, Any]] = {"nogil": True, "error_model": "numpy", "_nrt": False}


def inline(function: F) -> F:
    """Compile a piece of a kernel into its callers."""
    return cast("F", numba.njit(**_OPTIONS)(function))


def kernel(function: F) -> F:
    """Compile a loop at its first call for each set of argument types, or take what an earlier process compiled.

    It allocates nothing (what it needs to write in is handed in), raises nothing, and lets go of the GIL.
    """
    made: Any = numba.njit(**_OPTIONS)(function)
    keep(made)
    return cast("F", made)

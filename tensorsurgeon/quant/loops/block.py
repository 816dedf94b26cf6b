"""The block of 64-bit words in which a kernel takes its arguments and leaves its result.

First the result, then room for an exception (never used), then the values. An array is these values: owner and parent
(none of either), number of elements, bytes per element, address, shape and strides, as numba hands arrays over
(``numba.core.callconv.CPUCallConv``).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

ENTRY: Final = "tensorsurgeon_kernel"
"""The one function of an object file, ``int32 ENTRY(block)``."""

RESULTS: Final = {"none": "8x", "int64": "q", "bool": "?7x", "float32": "f4x"}
"""How a result lies in its word, by numba's name for its type: what a kernel may return."""

# How a number lies in its word, and LLVM's type for it.
_NUMBERS: Final[dict[type, tuple[str, str]]] = {
    bool: ("?7x", "i8"),
    int: ("q", "i64"),
    float: ("d", "double"),
    np.bool_: ("?7x", "i8"),
    np.uint8: ("B7x", "i8"),
    np.int64: ("q", "i64"),
    np.uint64: ("Q", "i64"),
    np.float32: ("f4x", "float"),
    np.float64: ("d", "double"),
}


def check(argument: Any) -> None:
    """Refuse what no kernel takes: ValueError for a strange array, TypeError for anything else."""
    if isinstance(argument, np.ndarray):
        if not argument.flags.aligned or not argument.dtype.isnative:
            found = f"{argument.dtype} {list(argument.shape)}"
            raise ValueError(f"kernels need aligned arrays in the machine's byte order, found one of {found} that is not")
    elif type(argument) not in _NUMBERS:
        raise TypeError(f"kernels take arrays and numbers, found {type(argument).__name__}")


def layout(argument: Any) -> str:
    """How an argument lies in the block, in the terms of ``struct``."""
    if isinstance(argument, np.ndarray):
        return f"QQqqQ{2 * argument.ndim}q"
    return _NUMBERS[type(argument)][0]


def llvm_types(argument: Any) -> list[str]:
    """LLVM's types of the values of an argument."""
    if isinstance(argument, np.ndarray):
        return ["ptr", "ptr", "i64", "i64", "ptr", *["i64"] * (2 * argument.ndim)]
    return [_NUMBERS[type(argument)][1]]


def kind(argument: Any) -> str:
    """The type of an argument, as far as code depends on it."""
    if isinstance(argument, np.ndarray):
        flags = argument.flags
        return f"{argument.dtype.str[1:]}x{argument.ndim}{'c' if flags.c_contiguous else 'a'}{'' if flags.writeable else 'r'}"
    return np.dtype(type(argument)).str[1:]

"""How the package compiles its loops: numba, without fastmath, into code that needs neither numba nor Python to run.

Only modules of kernels import this, and only ``loader`` imports those, where nothing is on disk yet: importing numba takes
longer than planning a 3 GB conversion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import llvmlite.binding as llvm
import numba as typed_numba
import numpy as np

from tensorsurgeon.quant.loops.block import ENTRY, RESULTS, llvm_types
from tensorsurgeon.quant.loops.host import target_machine

F = TypeVar("F", bound=Callable[..., Any])

# Its stubs know neither the options without a runtime nor how types are made.
numba: Any = typed_numba

# What code may call outside itself: C functions that every process has and whose results have no freedom.
_EVERYWHERE = ("memset", "memcpy", "memmove", "sqrt", "sqrtf")
# LLVM's own names for C functions whose results differ from one C library to the next.
_INEXACT = re.compile(r"llvm\.(exp|log|pow|a?(sin|cos|tan)h?|atan2|sincos)(2|10|i)?\b")


class NotSelfContainedError(Exception):
    """The compiler made code that cannot run by itself; the message says why."""


def inline(function: F) -> F:
    """Compile a piece of a kernel into its callers."""
    return cast("F", _compiler()(function))


def kernel(function: F) -> F:
    """Mark a loop that ``loader.Kernels`` compiles at its first call for each set of argument types.

    It allocates nothing (what it needs to write in is handed in), raises nothing, and calls nothing of Python's.
    ``error_model="numpy"`` divides as IEEE says instead of testing for zero, which would keep the loops scalar.
    ``fastmath`` stays off: it divides by multiplying with a reciprocal, which gives other codes than the tools'.
    """
    return cast("F", _compiler()(function))


def _compiler() -> Any:
    # Without numba's runtime (_nrt) an allocation is a compile error, and without the wrappers there is no Python.
    bare = {"_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(nogil=True, error_model="numpy", **bare)


def object_code(function: Any, arguments: Sequence[Any]) -> tuple[str, bytes]:
    """Type of the result, and object file, of a kernel for arguments of these types, on this CPU.

    The file holds one function to call, ``int32 ENTRY(block)``: see ``block``. It calls the kernel by numba's own convention
    (``numba.core.callconv.CPUCallConv``), ``status f(result*, exception**, values...)``. NotSelfContainedError where numba
    takes values otherwise, or the code refers to more outside itself than a few C functions.
    """
    signature = tuple(map(_type_of, arguments))
    function.compile(signature)
    description = function.overloads[signature].fndesc
    symbol, returns = description.llvm_func_name, str(description.restype)
    module = llvm.parse_assembly(function.inspect_llvm(signature))
    wanted = ["ptr", "ptr", *(part for argument in arguments for part in llvm_types(argument))]
    found = [str(argument.type) for argument in module.get_function(symbol).arguments]
    if found != wanted or returns not in RESULTS:
        raise NotSelfContainedError(f"numba {numba.__version__} takes {found} and gives {returns}, wanted {wanted}")
    named = [value.name for value in (*module.functions, *module.global_variables) if value.is_declaration]
    outside = [name for name in named if not _is_harmless(name)]
    if outside:
        raise NotSelfContainedError(f"{symbol} refers to {', '.join(outside)}")
    module.link_in(llvm.parse_assembly(_entry(symbol, found)))
    return returns, target_machine().emit_object(module)


def _entry(symbol: str, taken: Sequence[str]) -> str:
    """LLVM's text of a function that calls another with values from a block of 64-bit words."""
    lines = [f'declare i32 @"{symbol}"({", ".join(taken)})', f"define i32 @{ENTRY}(ptr %block) {{"]
    for number, kind in enumerate(taken):
        lines.append(f"  %place{number} = getelementptr i64, ptr %block, i64 {number}")
        if number >= 2:  # the first two are places themselves
            lines.append(f"  %value{number} = load {kind}, ptr %place{number}")
    values = [f"{kind} %{'place' if number < 2 else 'value'}{number}" for number, kind in enumerate(taken)]
    return "\n".join([*lines, f'  %status = call i32 @"{symbol}"({", ".join(values)})', "  ret i32 %status", "}"])


def _is_harmless(name: str) -> bool:
    """Whether code that refers to this name still stands alone."""
    if name.startswith("llvm."):
        return _INEXACT.match(name) is None
    return name in _EVERYWHERE and llvm.address_of_symbol(name) is not None


def callable_in_process(function: Any) -> Callable[[Sequence[Any]], Any]:
    """A kernel in numba's own hands, taking its arguments as one sequence: compiled anew in every process."""
    dispatcher = numba.njit(nogil=True, error_model="numpy")(function.py_func)
    return lambda arguments: dispatcher(*arguments)


def _type_of(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        layout, readonly = "C" if argument.flags.c_contiguous else "A", not argument.flags.writeable
        return numba.types.Array(numba.from_dtype(argument.dtype), argument.ndim, layout, readonly=readonly)
    return numba.typeof(argument)

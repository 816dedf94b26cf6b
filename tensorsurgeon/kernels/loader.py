"""Call compiled kernels with NumPy arrays, without the GIL, and without numba wherever their code is on disk already."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np

log = logging.getLogger(__name__)

_lock = threading.Lock()
_SCALARS: Final[dict[str, Any]] = {
    "b1": ctypes.c_bool,
    "u1": ctypes.c_uint8,
    "i8": ctypes.c_int64,
    "u8": ctypes.c_uint64,
    "f4": ctypes.c_float,
    "f8": ctypes.c_double,
}
_RESULTS: Final[dict[str, Any]] = {
    "none": ctypes.c_void_p,
    "int64": ctypes.c_int64,
    "bool": ctypes.c_bool,
    "float32": ctypes.c_float,
}
# numba's calling convention: 0 for a result, -2 for a result of None. Everything else is an exception.
_RETURNED: Final = (0, -2)


class Kernels:
    """The kernels of one module of this package as attributes, such as ``Kernels("packing").pack4``."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("_"):
            raise AttributeError(name)
        found = Kernel(self._module, name)
        setattr(self, name, found)
        return found


class Kernel:
    """One kernel, loaded or compiled at the first call for each set of argument types.

    Arguments are arrays (aligned; written in place), int, float, bool, or NumPy scalars, whose type then counts.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name
        self._entries: dict[tuple[str, ...], Callable[[Sequence[Any]], Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        kinds = tuple(map(_kind, arguments))
        entry = self._entries.get(kinds)
        if entry is None:
            with _lock:
                entry = self._entries.get(kinds) or self._prepare(kinds, arguments)
                self._entries[kinds] = entry
        return entry(arguments)

    def _prepare(self, kinds: tuple[str, ...], arguments: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
        from tensorsurgeon.kernels import host, store

        file = "-".join((self._module, self._name, *kinds))
        found = store.read(file)
        if found is None:
            from tensorsurgeon.kernels import compiled

            function = getattr(import_module(f"tensorsurgeon.kernels.{self._module}"), self._name)
            try:
                found = store.ObjectFile(*compiled.object_code(function, arguments))
            except compiled.NotSelfContainedError as error:
                log.warning("%s.%s is compiled in every process: %s", self._module, self._name, error)
                return compiled.callable_in_process(function)
            store.write(file, found)
        address, engine = host.load(found.code, found.symbol)
        return _Entry(address, engine, kinds, found.returns)


class _Entry:
    """Machine code at an address, called by numba's convention for C (``numba.core.callconv.CPUCallConv``).

    ``status f(result*, exception**, arguments...)``, where an array is owner, parent (none of either), size, bytes per
    element, data, shape and strides.
    """

    def __init__(self, address: int, engine: object, kinds: Sequence[str], returns: str) -> None:
        taken = [ctypes.c_void_p, ctypes.c_void_p]
        for kind in kinds:
            taken += [_SCALARS[kind]] if kind in _SCALARS else _array(int(kind[-2]))
        self._function = ctypes.CFUNCTYPE(ctypes.c_int32, *taken)(address)
        self._engine = engine
        self._result = _RESULTS[returns]

    def __call__(self, arguments: Sequence[Any]) -> Any:
        result, exception = self._result(), ctypes.c_void_p()
        values: list[Any] = [ctypes.byref(result), ctypes.byref(exception)]
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                values += (None, None, argument.size, argument.itemsize, argument.ctypes.data)
                values += argument.shape
                values += argument.strides
            else:
                values.append(argument.item() if isinstance(argument, np.generic) else argument)
        status = self._function(*values)
        if status not in _RETURNED:
            raise RuntimeError(f"a kernel ended with status {status}")
        return result.value


def _kind(argument: Any) -> str:
    """The type of an argument, as far as code depends on it."""
    if isinstance(argument, np.ndarray):
        if not argument.flags.aligned:
            raise ValueError(f"kernels need aligned arrays, found one of {argument.dtype} {list(argument.shape)} that is not")
        return f"{argument.dtype.str[1:]}x{argument.ndim}{'c' if argument.flags.c_contiguous else 'a'}"
    if isinstance(argument, np.generic):
        return argument.dtype.str[1:]
    kind = {bool: "b1", int: "i8", float: "f8"}.get(type(argument))
    if kind is None:
        raise TypeError(f"kernels take arrays and numbers, found {type(argument).__name__}")
    return kind


def _array(dimensions: int) -> list[Any]:
    owner = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    return owner + [ctypes.c_int64] * (2 * dimensions)

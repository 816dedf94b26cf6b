"""Call compiled kernels with NumPy arrays, without the GIL, and without numba wherever their code is on disk already."""

from __future__ import annotations

import ctypes
import logging
import struct
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np

from tensorsurgeon.quant.loops import block

log = logging.getLogger(__name__)

_lock = threading.Lock()
# C_CONTIGUOUS, ALIGNED, WRITEABLE.
_FLAGS: Final = 0x1 | 0x100 | 0x400
# 0 for a result, -2 for a result of None. Everything else is an exception.
_RETURNED: Final = (0, -2)


class Kernels:
    """The kernels of one module of this package as attributes, such as ``Kernels("bitpack").pack4``."""

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

    Arguments are arrays (written in place, if they may be), int, float, bool, or NumPy scalars, whose type then counts.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name
        self._entries: dict[tuple[Any, ...], Callable[[Sequence[Any]], Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        # As cheap as can be: there are tens of thousands of calls, with the GIL held.
        kinds = tuple(
            [
                ((d := a.dtype).char, d.isnative, a.ndim, a.flags.num & _FLAGS) if isinstance(a, np.ndarray) else type(a)
                for a in arguments
            ]
        )
        entry = self._entries.get(kinds)
        if entry is None:
            with _lock:
                entry = self._entries.get(kinds) or self._prepare(arguments)
                self._entries[kinds] = entry
        return entry(arguments)

    def _prepare(self, arguments: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
        from tensorsurgeon.quant.loops import host, store

        for argument in arguments:
            block.check(argument)
        file = "-".join((self._module, self._name, *map(block.kind, arguments)))
        found = store.read(file)
        if found is None:
            from tensorsurgeon.quant.loops import compiled

            function = getattr(import_module(f"tensorsurgeon.quant.loops.{self._module}"), self._name)
            try:
                found = store.ObjectFile(*compiled.object_code(function, arguments))
            except compiled.NotSelfContainedError as error:
                log.warning("%s.%s is compiled in every process: %s", self._module, self._name, error)
                return compiled.callable_in_process(function)
            store.write(file, found)
        return _Entry(*host.load(found.code), "".join(map(block.layout, arguments)), found.returns)


class _Entry:
    """Machine code at an address."""

    def __init__(self, address: int, engine: object, layout: str, returns: str) -> None:
        self._engine = engine
        self._values = struct.Struct(f"=16x{layout}")
        self._words = ctypes.c_char * self._values.size
        self._result = struct.Struct(f"={block.RESULTS[returns]}")
        # Of a type that lets go of the GIL.
        self._function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(address)

    def __call__(self, arguments: Sequence[Any]) -> Any:
        values: list[Any] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                values += (0, 0, argument.size, argument.itemsize, argument.__array_interface__["data"][0])
                values += argument.shape
                values += argument.strides
            else:
                values.append(argument)
        words = self._words()
        self._values.pack_into(words, 0, *values)
        status = self._function(words)
        if status not in _RETURNED:
            raise RuntimeError(f"a kernel ended with status {status}")
        result = self._result.unpack_from(words)
        return result[0] if result else None

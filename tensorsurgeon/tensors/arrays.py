"""Where result arrays live: buffers that a worker uses again for every unit.

Fresh pages cost more than the arithmetic (memcpy into warm memory runs at 22 GB/s here, into fresh pages at 1 to
4), so a worker opens one ``Workspace`` and resets it between units. Code that makes result arrays calls
``empty``; outside a workspace that is ``numpy.empty``, so nothing else has to know.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import numpy as np

_CACHE_LINE = 64
_local = threading.local()


class Workspace:
    """A grow-only list of buffers handed out in turn; everything handed out is void after ``reset``."""

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []
        self._next = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        nbytes = prod(shape) * dtype.itemsize
        if self._next == len(self._buffers):
            self._buffers.append(np.empty(0, np.uint8))
        buffer = self._buffers[self._next]
        if buffer.nbytes < nbytes:
            # Rounded up, so that units of slightly different size do not reallocate again and again.
            buffer = self._buffers[self._next] = aligned((-(-nbytes // (1 << 16)) << 16,), np.uint8)
        self._next += 1
        return buffer[:nbytes].view(dtype).reshape(shape)

    def reset(self) -> None:
        self._next = 0


def aligned(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """An uninitialised array that begins with a cache line, where NumPy's begin anywhere in one.

    A vector register may be as wide as a cache line: loops over other arrays touch two lines for each, and how long they
    take is left to the chance of an address.
    """
    element = np.dtype(dtype)
    nbytes = prod(shape) * element.itemsize
    buffer = np.empty(nbytes + _CACHE_LINE, np.uint8)
    start = -buffer.ctypes.data % _CACHE_LINE
    return buffer[start : start + nbytes].view(element).reshape(shape)


def empty(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """An uninitialised array, from this thread's workspace if one is open."""
    workspace: Workspace | None = getattr(_local, "workspace", None)
    if workspace is None:
        return np.empty(shape, dtype)
    return workspace.empty(shape, np.dtype(dtype))


@contextmanager
def workspace_of_thread() -> Iterator[Workspace]:
    """Open a workspace for this thread; ``empty`` draws from it until the block ends."""
    workspace = _local.workspace = Workspace()
    try:
        yield workspace
    finally:
        _local.workspace = None

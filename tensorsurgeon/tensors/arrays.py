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
_STEP_BYTES = 1 << 16
# Small units may keep as much as a copy needs.
_LEAST_BYTES = 4 << 20
_UNLIMITED = 1 << 62
_local = threading.local()


class Workspace:
    """Buffers handed out again and again; everything handed out is void after ``reset``.

    It holds no more than the limit of the last ``reset``, and an eighth for buffers that are a little too large: what is
    kept for the next unit counts as memory of that unit.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._used: list[np.ndarray] = []
        self._limit = _UNLIMITED

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, in use or not."""
        return sum(buffer.nbytes for buffer in (*self._free, *self._used))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        nbytes = prod(shape) * dtype.itemsize
        buffer = self._fitting(nbytes)
        if buffer is None:
            # Rounded up, so that units of slightly different size do not reallocate again and again.
            rounded = -(-nbytes // _STEP_BYTES) * _STEP_BYTES
            self._shrink(self._limit - rounded)
            buffer = aligned((rounded,), np.uint8)
        self._used.append(buffer)
        return buffer[:nbytes].view(dtype).reshape(shape)

    def reset(self, limit_bytes: int | None = None) -> None:
        """Take every buffer back, and let go of what is more than ``limit_bytes`` in all."""
        self._limit = _UNLIMITED if limit_bytes is None else max(limit_bytes, _LEAST_BYTES)
        self._free += self._used
        self._used = []
        self._shrink(self._limit)

    def mark(self) -> int:
        """A place to go back to with ``release``."""
        return len(self._used)

    def release(self, mark: int) -> None:
        """Take back what was handed out since ``mark``."""
        self._free += self._used[mark:]
        del self._used[mark:]

    def clear(self) -> None:
        """Let go of every buffer."""
        self._free, self._used = [], []

    def _fitting(self, nbytes: int) -> np.ndarray | None:
        fitting = [n for n, buffer in enumerate(self._free) if nbytes <= buffer.nbytes <= nbytes + nbytes // 8 + 2 * _STEP_BYTES]
        return self._free.pop(min(fitting, key=lambda n: self._free[n].nbytes)) if fitting else None

    def _shrink(self, limit_bytes: int) -> None:
        """Let go of free buffers, the largest first, until all that are left fit."""
        self._free.sort(key=lambda buffer: buffer.nbytes)
        while self._free and self.nbytes > limit_bytes:
            self._free.pop()


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
def for_a_while() -> Iterator[None]:
    """What ``empty`` hands out within the block is void behind it, and is handed out again."""
    workspace: Workspace | None = getattr(_local, "workspace", None)
    mark = 0 if workspace is None else workspace.mark()
    try:
        yield
    finally:
        if workspace is not None:
            workspace.release(mark)


@contextmanager
def workspace_of_thread() -> Iterator[Workspace]:
    """Open a workspace for this thread; ``empty`` draws from it until the block ends."""
    workspace = _local.workspace = Workspace()
    try:
        yield workspace
    finally:
        _local.workspace = None

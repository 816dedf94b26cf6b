"""Give memory back between layers, so that a walk of forty layers holds what a walk of one does."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Final

# glibc's mallopt: blocks from this size on are mapped one by one and unmapped when freed. Left to itself the threshold
# rises to 32 MB with the blocks that are freed, and matrices of a layer end up in heaps that fall to pieces.
_M_MMAP_THRESHOLD: Final = -3
_MAPPED_BYTES: Final = 4 << 20


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library if it is glibc, which is told once to map large blocks."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim") or not hasattr(libc, "mallopt"):
        return None
    libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    return libc


def give_back_memory() -> None:
    """Return what is free to the system; nothing happens where the C library is another one."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)

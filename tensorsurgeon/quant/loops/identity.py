"""What compiled code depends on, as one digest: under another one it may not run, or give other results."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tensorsurgeon.quant.loops import host


@cache
def identity() -> str | None:
    """The digest of this process: kernels' sources, compiler and its settings, CPU. None without sources to tell by."""
    return digest()


def digest() -> str | None:
    """The same as things are now: another one means that a source was changed while this process ran."""
    # Every module here, whether it holds kernels or not: which one a kernel takes a piece from is nobody's burden.
    sources = sorted(Path(__file__).parent.glob("*.py"))
    if not sources:
        return None
    numba = find_spec("numba")  # found, not imported
    if numba is not None and numba.origin is not None:
        sources.append(Path(numba.origin).with_name("_version.py"))
    found = hashlib.blake2b(digest_size=16)
    settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
    for part in (host.identity(), np.__version__, *settings):
        found.update(part.encode() + b"\n")
    for source in sources:
        found.update(source.read_bytes())
    return found.hexdigest()

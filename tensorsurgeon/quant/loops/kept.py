"""Compiled loops between processes: numba's own cache, where it may be believed.

numba keeps code beside the sources (in ``__pycache__``), or else in the user's cache directory, or where
``NUMBA_CACHE_DIR`` says, by source file, argument types and CPU. Three things it leaves open are closed here: code is also
tied to the sources of all modules of this folder, for loops take pieces from each other; a file that is damaged, or holds
another loop's code (as when two processes number their files alike), is made again instead of run or raised; and a folder
that takes nothing costs time, not the run.
"""

# mypy: disable-error-code="no-untyped-call"
# What comes from numba has no types.

from __future__ import annotations

import hashlib
import logging
import pickle
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.serialize import dumps

log = logging.getLogger(__name__)


def keep(dispatcher: Any) -> None:
    """Let a function of ``numba.njit`` keep its code, as ``cache=True`` would.

    Where numba finds no folder that it can write, the function is compiled in every process, and one message says so.
    """
    try:
        dispatcher._cache = _Kept(dispatcher.py_func)
    except RuntimeError as error:
        _say_what_it_costs(str(error))


class _Code(CompileResultCacheImpl):
    """What is kept of one compiled loop: numba's data, and a digest of it that no other loop or version has."""

    def reduce(self, cres: Any) -> tuple[bytes, bytes]:
        data = dumps(super().reduce(cres))
        return self._digest(data), data

    def rebuild(self, target_context: Any, payload: tuple[bytes, bytes]) -> Any:
        digest, data = payload
        if digest != self._digest(data):
            raise ValueError("damaged, or of another version")
        return super().rebuild(target_context, pickle.loads(data))  # noqa: S301 (as numba does)

    def _digest(self, data: bytes) -> bytes:
        return hashlib.blake2b(_sources() + self.filename_base.encode() + data).digest()


class _Kept(FunctionCache):
    """The files of one loop, all its argument types."""

    _impl_class = _Code

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            # Not ``super().load_overload``, which first makes the compiler ready: 0.15 CPU seconds and 40 MB in every process.
            found = self._load_overload(sig, target_context)
            if found is None or found.signature.args == tuple(sig):
                return found
            reason = "holds code for other types"
        except Exception as error:  # noqa: BLE001 (garbage may unpickle into any error)
            reason = f"cannot be read ({type(error).__name__}: {error})"
        log.info("%s in %s %s and is compiled again", self._impl.filename_base, self.cache_path, reason)
        with suppress(OSError):
            self.flush()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _say_what_it_costs(str(error))


@cache
def _sources() -> bytes:
    """A digest of all modules of this folder."""
    return hashlib.blake2b(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))).digest()


_said = False


def _say_what_it_costs(reason: str) -> None:
    global _said
    if not _said:
        log.warning(
            "compiled loops cannot be kept (%s): every run compiles them again, which takes some seconds; set NUMBA_CACHE_DIR "
            "to a folder that can be written",
            reason,
        )
    _said = True

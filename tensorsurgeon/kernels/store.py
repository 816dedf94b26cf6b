"""Where compiled kernels are kept between processes: a folder that nobody else can write.

What lies in it is executed, so a folder that belongs to someone else, or that others may write, is never used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tensorsurgeon.kernels import host

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """Machine code, and the type of its result by numba's name."""

    returns: str
    code: bytes


def read(name: str) -> ObjectFile | None:
    """What was kept under a name for this CPU, compiler and version of the sources; None if nothing whole was."""
    place = folder()
    if place is None:
        return None
    try:
        head, _, code = (place / name).read_bytes().partition(b"\n")
        told = json.loads(head)
        if told["blake2b"] == hashlib.blake2b(code).hexdigest():
            return ObjectFile(told["returns"], code)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log.info("%s is damaged and will be made again", place / name)
    return None


def write(name: str, made: ObjectFile) -> None:
    """Keep machine code for the next process; where that cannot be, the next one compiles again."""
    place = folder()
    if place is None:
        return
    told = {"returns": made.returns, "blake2b": hashlib.blake2b(made.code).hexdigest()}
    try:
        descriptor, temporary = tempfile.mkstemp(dir=place)
        try:
            with open(descriptor, "wb") as file:
                file.write(json.dumps(told).encode() + b"\n" + made.code)
            os.replace(temporary, place / name)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        log.info("cannot keep compiled code: %s", error)


@cache
def folder() -> Path | None:
    """The folder for code of this version of the kernels, made if need be; None where none can be had.

    ``TENSORSURGEON_CACHE`` names the place, or else the user's cache directory, or else the temporary one.
    """
    for parent in _places():
        if _is_private(parent) and _is_private(parent / _identity()):
            return parent / _identity()
    log.warning("no private folder for compiled code (set TENSORSURGEON_CACHE); compiling in every process")
    return None


def _places() -> Iterator[Path]:
    named = os.environ.get("TENSORSURGEON_CACHE")
    if named:
        yield Path(named)
        return
    with suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tensorsurgeon"
    yield Path(tempfile.gettempdir()) / f"tensorsurgeon-{os.getuid() if hasattr(os, 'getuid') else 'kernels'}"


def _is_private(place: Path) -> bool:
    """Whether a folder is there, or could be made, that only this user can write."""
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.lstat()
    except OSError:
        return False
    owned = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
    return owned and place.is_dir() and not place.is_symlink() and os.access(place, os.W_OK)


@cache
def _identity() -> str:
    """A digest of all that decides what machine code is made: the kernels' sources, the compiler, the CPU."""
    numba = find_spec("numba")  # found, not imported
    sources = sorted(Path(__file__).parent.glob("*.py"))
    if numba is not None and numba.origin is not None:
        sources.append(Path(numba.origin).with_name("_version.py"))
    digest = hashlib.blake2b(host.identity().encode(), digest_size=16)
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()

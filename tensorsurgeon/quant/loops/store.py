"""Compiled kernels on disk, between processes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass

from tensorsurgeon.quant.loops.identity import digest, identity
from tensorsurgeon.quant.loops.place import folder

log = logging.getLogger(__name__)

_sources_moved = False


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """Machine code, and the type of its result by numba's name."""

    returns: str
    code: bytes

    def checksum(self) -> str:
        return hashlib.blake2b(self.returns.encode() + b"\n" + self.code).hexdigest()


def read(name: str) -> ObjectFile | None:
    """What was kept under a name; None if nothing whole was."""
    place = folder()
    if place is None:
        return None
    try:
        head, _, code = (place / name).read_bytes().partition(b"\n")
        told = json.loads(head)
        found = ObjectFile(told["returns"], code)
        if told["checksum"] == found.checksum():
            return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    log.info("%s is damaged and will be made again", place / name)
    return None


def write(name: str, made: ObjectFile) -> None:
    """Keep machine code for the next process; where that cannot be, the next one compiles again.

    Nothing is kept any more once a source has changed under this process: which version a module was imported from,
    nobody knows then.
    """
    global _sources_moved
    place = folder()
    _sources_moved = _sources_moved or digest() != identity()
    if place is None or _sources_moved:
        return
    told = {"returns": made.returns, "checksum": made.checksum()}
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

"""Files of a stranger that are read whole: config, index, record. Their kind and size are looked at before they are believed."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, Final, NamedTuple

from tensorsurgeon.errors import SurgeonError

# The largest that is known of has 300 KB; a config a thousand times as large is none.
MAX_CONFIG_BYTES: Final = 16 << 20
# A million names of two hundred letters; a shard of them has a header of 100 MB at most.
MAX_INDEX_BYTES: Final = 256 << 20
# Python's own limit for digits is larger than any number in a config has.
_LFS_POINTER: Final = b"version https://git-lfs"


class Stamp(NamedTuple):
    """What a file system says of a file; it changes when the file is written or replaced."""

    nbytes: int
    modified_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, info: os.stat_result) -> Stamp:
        return cls(info.st_size, info.st_mtime_ns, info.st_ino, info.st_dev)


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, to read; OSError for anything else. A pipe or device is not even waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(22, "not a regular file", str(path))
    return fd


def unreadable(error: OSError) -> str:
    """What is wrong with a file that cannot be read, and where that helps, what to do."""
    remedy = "; make it readable for you" if error.errno in (errno.EACCES, errno.EPERM) else ""
    return f"cannot be read: {error.strerror}{remedy}"


def read_small(path: Path, limit: int) -> tuple[bytes, Stamp]:
    """A file of at most ``limit`` bytes, and its stamp from before it was read; OSError where it is larger, or no file."""
    with open(open_regular(path), "rb") as file:
        stamp = Stamp.of(os.fstat(file.fileno()))
        if stamp.nbytes > limit:
            raise OSError(27, f"has {stamp.nbytes} bytes, more than the {limit} that such a file can have", str(path))
        # One byte more: a file may grow, and those of /proc say that they are empty.
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(27, f"has more than the {limit} bytes that such a file can have", str(path))
    return content, stamp


def read_json(path: Path, limit: int, error: type[SurgeonError]) -> tuple[bytes, Any, Stamp]:
    """Text, content and stamp of a JSON file; ``error`` with the path where it cannot be read or is none."""
    try:
        text, stamp = read_small(path, limit)
    except PermissionError:
        raise
    except OSError as fault:
        raise error(unreadable(fault), where=str(path)) from fault
    try:
        return text, parse_json(text), stamp
    except ValueError as fault:
        raise error(f"is not valid JSON: {fault}", where=str(path)) from fault


def parse_json(content: bytes) -> Any:
    """JSON of a stranger; ValueError says what is wrong with it, however deep it nests and however long its numbers are."""
    if is_lfs_pointer(content):
        raise ValueError("it is a Git LFS pointer and not the file itself; run git lfs pull")
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_lfs_pointer(content: bytes) -> bool:
    """Whether this is what Git leaves in place of a large file that was not fetched."""
    return content.startswith(_LFS_POINTER)

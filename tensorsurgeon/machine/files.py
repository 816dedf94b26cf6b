"""Files made durable and grown to size, on every system that has a way to do it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

# What file systems say that cannot reserve space: growing the file is then all that can be done.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def reserve(fd: int, nbytes: int) -> None:
    """Grow a file to its final size and take the disk space now, where system and file system can."""
    if hasattr(os, "posix_fallocate"):
        try:
            if nbytes:
                os.posix_fallocate(fd, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise
    if os.fstat(fd).st_size < nbytes:
        os.ftruncate(fd, nbytes)


def make_durable(fd: int) -> None:
    """Return when the file's bytes and its size would survive a power cut."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        # macOS: fsync hands the bytes to the disk, whose own cache may still lose them.
        try:
            fcntl.fcntl(fd, full)
            return
        except OSError:
            # A file system that knows no such thing (a network share): fsync is what it has.
            pass
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def make_folder_durable(folder: Path) -> None:
    """Return when renames in a folder would survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

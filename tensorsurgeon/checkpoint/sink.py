"""Where bytes go: output shards at their final size, written in any order and published when whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tensorsurgeon.checkpoint.layout import Layout
from tensorsurgeon.checkpoint.small_files import open_regular
from tensorsurgeon.errors import SinkError
from tensorsurgeon.machine.files import make_durable, make_folder_durable, reserve


class Sink:
    """The shards of one run, each ``NAME.partial`` until it is published; safe to use from many threads."""

    def __init__(self, target: Path, layout: Layout) -> None:
        self.target = target
        self._layout = layout
        self._paths = [target / f"{shard.name}.partial" for shard in layout.shards]
        self._fds: list[int] = []
        self._is_dirty = [True] * len(self._paths)

    def open(self) -> None:
        """Open every shard at its final size with its header; existing bytes of a stopped run stay.

        The space is reserved now, so that a disk too small is noticed before the first weight is read.
        """
        for number, (path, shard) in enumerate(zip(self._paths, self._layout.shards, strict=True)):
            final = self.target / shard.name
            with sink_errors(path, "be created"):
                if final.exists() and not path.exists():
                    os.replace(final, path)
                fd = _open_own(path)
                self._fds.append(fd)
                if os.fstat(fd).st_size > shard.file_bytes:
                    os.ftruncate(fd, shard.file_bytes)
                reserve(fd, shard.file_bytes)
            self.write(number, 0, memoryview(shard.header))

    def join(self) -> None:
        """Open the shards that another process made at their final size, to write beside it.

        For writing only: a client of NFS that may read would fill the rest of a page from the server, and write all of it
        back over what another machine has put there since.
        """
        for path in self._paths:
            with sink_errors(path, "be opened"):
                self._fds.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
        self._is_dirty = [False] * len(self._paths)

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        done = 0
        with sink_errors(self._paths[shard], "be written"):
            while done < len(data):
                done += os.pwrite(self._fds[shard], data[done:], offset + done)
        # After the bytes, never before: a sync in between would take a shard for clean that is not.
        self._is_dirty[shard] = True

    def read(self, shard: int, offset: int, buffer: memoryview) -> int:
        """Bytes that a stopped run left; returns how many there were."""
        with sink_errors(self._paths[shard], "be read"):
            return os.preadv(self._fds[shard], [buffer], offset)

    def sync(self) -> None:
        """Make everything written so far durable; one thread at a time."""
        for shard, fd in enumerate(self._fds):
            if self._is_dirty[shard]:
                self._is_dirty[shard] = False
                with sink_errors(self._paths[shard], "be made durable"):
                    make_durable(fd)

    def publish_shards(self) -> None:
        """Give every shard its final name; call when all bytes are durable."""
        self.close()
        for path, shard in zip(self._paths, self._layout.shards, strict=True):
            with sink_errors(path, "be published"):
                os.replace(path, self.target / shard.name)
        make_folder_durable(self.target)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def _open_own(path: Path) -> int:
    """A descriptor of a file that leads nowhere else: a link could lead to anything, and a hard link be the source itself.

    Where a file has other names, its bytes are not ours to change: it is left to them, and a new one takes its place.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(path, flags, 0o644)
    if os.fstat(fd).st_nlink > 1:
        os.close(fd)
        path.unlink()
        fd = os.open(path, flags | os.O_EXCL, 0o644)
    return fd


def refuse_links_below(target: Path, names: Iterable[str]) -> None:
    """Raise SinkError if a folder on the way to one of these files is a link: what it leads to is not the target."""
    for folder in sorted({parent for name in names for parent in Path(name).parents if parent.name}):
        if (target / folder).is_symlink():
            raise SinkError("is a link to another folder, which is not written through; remove it", where=str(target / folder))


def publish_bytes(path: Path, content: bytes) -> None:
    """Write a small file so that it is either whole or absent."""

    _publish(path, lambda file: file.write(content))


def publish_copy(source: Path, path: Path) -> None:
    """Copy a side file with its time stamps, so that it is either whole or absent.

    Owner and mode are those of any new file: a stranger's setuid bit must not become ours.
    """
    info = os.stat(source)

    def fill(file: BinaryIO) -> None:
        with open(open_regular(source), "rb") as original:
            shutil.copyfileobj(original, file, 1 << 20)
        file.flush()
        os.utime(file.fileno(), ns=(info.st_atime_ns, info.st_mtime_ns))

    _publish(path, fill)


def _publish(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    with sink_errors(path, "be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # What lies there is a leftover of ours, or a link of somebody's; neither is written through.
            partial.unlink(missing_ok=True)
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with open(fd, "wb") as file:
                fill(file)
                file.flush()
                make_durable(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def sink_errors(path: Path, what: str) -> Iterator[None]:
    """Errors of the target's file system, as messages that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SinkError(
                "the disk is full", where=str(path), remedy="; free some space and run the same command with {resume}"
            ) from error
        raise SinkError(
            f"cannot {what}: {error.strerror}",
            where=str(path),
            remedy="; when that is mended, run the same command with {resume}",
        ) from error

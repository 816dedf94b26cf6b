"""Where bytes come from: the shards of a checkpoint, read by ranges."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from types import TracebackType
from typing import Self

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.errors import SourceError


class Source:
    """Open shards, read at offsets; safe to use from many threads. ``shards`` are those to open, by number; all by default.

    Reads copy into a caller's buffer instead of mapping the file: a mapped page costs a fault each time, counts as
    resident memory, and turns a truncated file into a signal instead of a message.
    """

    is_streamed = False
    """Whether shards come and go while a run lasts, so that they are best read in their order."""

    def __init__(self, checkpoint: Checkpoint, shards: Iterable[int] | None = None) -> None:
        self._paths: Sequence[str] = [str(shard.path) for shard in checkpoint.shards]
        self._locations = checkpoint.locations
        self._fds: dict[int, int] = {}
        try:
            for number in range(len(self._paths)) if shards is None else shards:
                self._fds[number] = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise SourceError(f"cannot be opened: {error.strerror}", where=str(error.filename)) from error

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of a shard; SourceError if the file ends before."""
        self._read_open(self._fds[shard], self._paths[shard], offset, buffer)

    def _read_open(self, fd: int, path: str, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise SourceError(f"reading {len(buffer)} bytes at {offset} failed: {error.strerror}", where=path) from error
            if not count:
                raise SourceError(
                    f"ends at byte {offset + done}, though its header promised more; the file changed during the run", where=path
                )
            done += count

    def read_tensor_into(self, tensor: int, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``start`` of a tensor, by its number in the checkpoint's order."""
        where = self._locations[tensor]
        self.read_into(where.shard, where.offset + start, buffer)

    def follow(self, steps: Sequence[Collection[int]], keep_steps: int | None = None) -> None:
        """What will be read, step after step: the shards of each. Of use to a source that is streamed."""

    def passed(self, step: int) -> None:
        """Nothing of this step will be read again, not even by a run that resumes this one."""

    def give_up(self) -> None:
        """The run has failed: whoever waits for bytes need not."""

    def discard(self) -> None:
        """The run is finished: nothing that was kept of the source stays."""

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_source(checkpoint: Checkpoint) -> Source:
    """The shards of a checkpoint, wherever they lie: those on the Hub are read by ranges, and nothing is kept of them."""
    if checkpoint.snapshot is None:
        return Source(checkpoint)
    from tensorsurgeon.checkpoint.hub.ranges import RangedSource

    return RangedSource(checkpoint, checkpoint.snapshot)

"""Where bytes come from: the shards of a checkpoint, read by ranges."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.errors import SourceError


class Source:
    """Open shards, read at offsets; safe to use from many threads.

    Reads copy into a caller's buffer instead of mapping the file: a mapped page costs a fault each time, counts as
    resident memory, and turns a truncated file into a signal instead of a message.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._paths: Sequence[str] = [str(shard.path) for shard in checkpoint.shards]
        self._locations = checkpoint.locations
        self._fds: list[int] = []
        try:
            for path in self._paths:
                self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            self.close()
            raise SourceError(f"cannot be opened: {error.strerror}", where=str(error.filename)) from error

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of a shard; SourceError if the file ends before."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fds[shard], [buffer[done:]], offset + done)
            except OSError as error:
                raise SourceError(
                    f"reading {len(buffer)} bytes at {offset} failed: {error.strerror}", where=self._paths[shard]
                ) from error
            if not count:
                raise SourceError(
                    f"ends at byte {offset + done}, though its header promised more; the file changed during the run",
                    where=self._paths[shard],
                )
            done += count

    def read_tensor_into(self, tensor: int, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``start`` of a tensor, by its number in the checkpoint's order."""
        where = self._locations[tensor]
        self.read_into(where.shard, where.offset + start, buffer)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

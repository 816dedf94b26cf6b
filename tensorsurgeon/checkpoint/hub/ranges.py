"""Shards on the Hub read by ranges, for whoever reads a checkpoint once and keeps nothing: the judge, a comparison."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import Final

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.hub.repository import read_range
from tensorsurgeon.checkpoint.hub.snapshot import Snapshot
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.errors import SourceError

# A request for each piece that is read would take longer to ask for than to send.
BLOCK_BYTES: Final = 8 << 20
_KEPT_BLOCKS: Final = 12


class RangedSource(Source):
    """The same as ``Source`` over a commit on the Hub; shards that lie in the cache are read there.

    Bytes come in blocks, of which the last few are kept in memory: readers go forward, several of them side by side. A
    range has no digest, so that only its length and the file's name at the Hub are compared with what was listed.
    """

    def __init__(self, checkpoint: Checkpoint, snapshot: Snapshot) -> None:
        super().__init__(checkpoint, [n for n, shard in enumerate(checkpoint.shards) if shard.path.exists()])
        self._snapshot = snapshot
        self._names = [shard.path.name for shard in checkpoint.shards]
        self._sizes = [shard.file_bytes for shard in checkpoint.shards]
        self._blocks: OrderedDict[tuple[int, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        if shard in self._fds:
            super().read_into(shard, offset, buffer)
            return
        done = 0
        while done < len(buffer):
            number, start = divmod(offset + done, BLOCK_BYTES)
            part = self._block(shard, number)[start : start + len(buffer) - done]
            if not part:
                raise SourceError(
                    f"ends at byte {offset + done}, and more was to be read", where=self._snapshot.where(self._names[shard])
                )
            buffer[done : done + len(part)] = part
            done += len(part)

    def _block(self, shard: int, number: int) -> bytes:
        """One block, asked for by one reader while the others wait for it."""
        key = shard, number
        with self._lock:
            block = self._blocks.get(key)
            is_mine = block is None
            if block is None:
                block = self._blocks[key] = Future()
                while len(self._blocks) > _KEPT_BLOCKS:
                    self._blocks.popitem(last=False)
            self._blocks.move_to_end(key)
        if is_mine:
            start = number * BLOCK_BYTES
            stop = min(start + BLOCK_BYTES, self._sizes[shard])
            try:
                data = read_range(self._snapshot, self._names[shard], start, stop, SourceError) if start < stop else b""
                block.set_result(data)
            except BaseException as error:
                block.set_exception(error)
                with self._lock:
                    self._blocks.pop(key, None)
                raise
        return block.result()

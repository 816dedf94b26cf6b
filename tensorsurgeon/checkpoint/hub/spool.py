"""Shards on the Hub read as files: fetched ahead of whoever reads them, and let go when all that reads them is done."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.hub.fetching import Fetcher
from tensorsurgeon.checkpoint.hub.ranges import RangedSource
from tensorsurgeon.checkpoint.hub.snapshot import Snapshot
from tensorsurgeon.checkpoint.hub.stays import Stays
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.errors import Interrupted, SourceError

# How long a reader sleeps before it looks again whether the run was stopped.
_PATIENCE: Final = 0.2
_FAREWELL: Final = 5.0


@dataclass(slots=True)
class _Present:
    """A shard on this disk, open; ``last`` is the step after which it goes."""

    fd: int
    path: Path
    is_ours: bool
    last: int
    readers: int = 0
    is_leaving: bool = False


class SpooledSource(Source):
    """The same as ``Source`` over a commit on the Hub, with the disk of a few shards.

    Whoever runs says first which shards each step reads (``follow``) and then which steps are over (``passed``): as soon as
    no step needs a shard any more it goes, and the next is fetched. Up to ``ahead`` steps are fetched before they are
    read. ``folder`` is the spool; where it is None shards go into the library's cache and stay there. ``stop`` ends waits.
    """

    is_streamed = True

    def __init__(
        self, checkpoint: Checkpoint, snapshot: Snapshot, folder: Path | None, *, ahead: int, stop: threading.Event
    ) -> None:
        super().__init__(checkpoint, ())
        self._checkpoint, self._snapshot, self._folder = checkpoint, snapshot, folder
        self._ahead, self._stop = ahead, stop
        self._names = [shard.path.name for shard in checkpoint.shards]
        self._fetcher = Fetcher(snapshot, checkpoint.root, folder, self._watch)
        self._changed = threading.Condition()
        self._stays = Stays(())
        self._window: int | None = None
        self._next = 0
        self._left: set[int] = set()
        self._present: dict[int, _Present] = {}
        self._error: BaseException | None = None
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._beside: RangedSource | None = None

    def follow(self, steps: Sequence[Collection[int]], keep_steps: int | None = None) -> None:
        """Begin to fetch for these steps, which take the place of those before; what is here and needed stays.

        With ``keep_steps`` a shard may come twice (``Stays``), and a reader that is steps ahead of what it said does not wait.
        """
        self._end_fetching()
        with self._changed:
            self._stays = Stays(steps, keep_steps)
            self._window = None if keep_steps is None else self._ahead
            self._next = 0
            self._left = set(range(len(steps)))
            wanted = {stay.shard for stay in self._stays.stays}
            for shard in [shard for shard in self._present if shard not in wanted]:
                self._let_go(shard)
            self._is_over = threading.Event()
            self._error = None
        if self._folder is not None:
            self._clear_folder({self._names[shard] for shard in wanted})
        self._thread = threading.Thread(target=self._fetch_all, name="surgeon-fetch", daemon=True)
        self._thread.start()

    def passed(self, step: int) -> None:
        """Nothing of this step will be read again."""
        with self._changed:
            self._left.discard(step)
            self._sweep()
            self._changed.notify_all()

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        with self._changed:
            while (found := self._present.get(shard)) is None:
                if self._error is not None:
                    raise self._error
                if self._stop.is_set() or self._is_over.is_set():
                    raise Interrupted("stopped while a shard was fetched; what is done is kept")
                if not self._is_coming(shard):
                    break
                self._changed.wait(_PATIENCE)
            if found is not None:
                found.readers += 1
        if found is None:
            # Nobody said that it would be read; it is had without a place in the spool.
            self._read_beside(shard, offset, buffer)
            return
        try:
            self._read_open(found.fd, str(found.path), offset, buffer)
        finally:
            with self._changed:
                found.readers -= 1
                if found.is_leaving and not found.readers:
                    os.close(found.fd)

    def give_up(self) -> None:
        """The run has failed: whoever waits for a shard need not."""
        self._is_over.set()
        with self._changed:
            self._changed.notify_all()

    def discard(self) -> None:
        """The run is finished: nothing of the spool stays."""
        self.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Let go of every file; shards in the spool stay, for a run that goes on."""
        self._end_fetching()
        with self._changed:
            for found in self._present.values():
                os.close(found.fd)
            self._present = {}
        if self._beside is not None:
            self._beside.close()
            self._beside = None
        super().close()

    def _end_fetching(self) -> None:
        self.give_up()
        if self._thread is not None:
            self._thread.join(_FAREWELL)
            self._thread = None

    def _watch(self) -> None:
        """Called while bytes come; ends a transfer that nobody waits for any more."""
        if self._stop.is_set() or self._is_over.is_set() or threading.current_thread() is not self._thread:
            raise Interrupted("stopped while a shard was fetched; what is done is kept")

    def _clear_folder(self, wanted: set[str]) -> None:
        """Remove what other runs left: shards that are not needed any more, and parts of shards."""
        assert self._folder is not None
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in wanted:
                path.unlink(missing_ok=True)

    def _fetch_all(self) -> None:
        over = self._is_over
        for number, stay in enumerate(self._stays.stays):
            with self._changed:
                self._next = number
                self._changed.wait_for(lambda n=number: over.is_set() or self._has_room(n))  # type: ignore[misc]
                if over.is_set():
                    return
                here = self._present.get(stay.shard)
                if here is not None:
                    here.last = stay.last
                    continue
                if stay.last < min(self._left, default=len(self._left)):
                    continue
            try:
                fetched = self._fetcher.fetch(self._names[stay.shard])
                fd = os.open(fetched.path, os.O_RDONLY | os.O_CLOEXEC)
            except BaseException as error:  # noqa: BLE001  # whoever waits for the shard raises it
                with self._changed:
                    self._error = _told(error, self._snapshot.where(self._names[stay.shard]))
                    self._changed.notify_all()
                return
            with self._changed:
                if over.is_set():
                    os.close(fd)
                    return
                self._present[stay.shard] = _Present(fd, fetched.path, fetched.is_ours, stay.last)
                self._sweep()
                self._changed.notify_all()
        with self._changed:
            self._next = len(self._stays.stays)

    def _has_room(self, number: int) -> bool:
        limit = self._stays.gone_before(number, self._ahead)
        return all(self._stays.rank(found.last) >= limit for found in self._present.values())

    def _is_coming(self, shard: int) -> bool:
        """Whether a shard is fetched before whoever reads it now has to be done; what comes later would wait for him."""
        coming = (stay for stay in self._stays.stays[self._next :] if stay.shard == shard)
        if self._window is None:
            return any(coming)
        latest = self._stays.rank(min(self._left, default=0)) + self._window
        return any(self._stays.rank(stay.first) <= latest for stay in coming)

    def _sweep(self) -> None:
        reached = min(self._left, default=1 << 60)
        for shard in [shard for shard, found in self._present.items() if found.last < reached]:
            self._let_go(shard)

    def _let_go(self, shard: int) -> None:
        found = self._present.pop(shard)
        if found.is_ours:
            found.path.unlink(missing_ok=True)
        if found.readers:
            found.is_leaving = True
        else:
            os.close(found.fd)

    def _read_beside(self, shard: int, offset: int, buffer: memoryview) -> None:
        with self._changed:
            if self._beside is None:
                self._beside = RangedSource(self._checkpoint, self._snapshot)
        self._beside.read_into(shard, offset, buffer)


def _told(error: BaseException, where: str) -> BaseException:
    """Errors of this disk as messages; the others are told already, or are faults of ours."""
    if isinstance(error, OSError):
        return SourceError(f"cannot be kept in the spool: {error.strerror or error}", where=where)
    return error

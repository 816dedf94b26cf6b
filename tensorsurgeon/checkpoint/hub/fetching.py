"""One shard from the Hub to this disk, whole and with the digest that the Hub listed."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from tensorsurgeon.checkpoint.hub.faults import persistently
from tensorsurgeon.checkpoint.hub.repository import silent_bar
from tensorsurgeon.checkpoint.hub.snapshot import HubFile, Snapshot
from tensorsurgeon.errors import SourceError

logger = logging.getLogger(__name__)

# A disk filled to the last byte stops everybody else on it.
_SPARE_BYTES: Final = 32 << 20
_CHUNK: Final = 1 << 20


class Fetched(NamedTuple):
    """A shard on this disk; ``is_ours`` where it lies in the spool and goes when it was read."""

    path: Path
    is_ours: bool


class Fetcher:
    """Brings shards of a commit to this disk: into the folder ``spool``, or into the library's cache where that is None.

    A shard that the cache holds is read there and stays. ``watch`` is called while bytes come, and may raise to end that.
    """

    def __init__(self, snapshot: Snapshot, root: Path, spool: Path | None, watch: Callable[[], None] = lambda: None) -> None:
        self._snapshot = snapshot
        self._root = root
        self._spool = spool
        self._watch = watch

    def fetch(self, name: str) -> Fetched:
        """The shard, checked; SourceError says why it cannot be had, and the run can go on later."""
        file, where = self._snapshot.files[name], self._snapshot.where(name)
        cached = self._root / name
        if cached.exists():
            if not self._is_right(cached, file):
                raise SourceError(
                    f"the file in the cache is damaged: it is not what the Hub lists ({file.digest}); remove {cached.resolve()}",
                    where=where,
                )
            return Fetched(cached, False)
        path = None if self._spool is None else self._spool / name
        if path is not None and path.exists():
            # Left by a run that was stopped.
            if self._is_right(path, file):
                return Fetched(path, True)
            path.unlink()
        for _ in range(2):
            began = time.monotonic()
            found = self._download(name, file, where)
            if self._is_right(found, file):
                logger.info("%s: fetched %.1f MB in %.1f s", where, file.nbytes / 1e6, time.monotonic() - began)
                return Fetched(found, path is not None)
            logger.warning("%s: what came is not what the Hub lists", where)
            found.resolve().unlink()
            found.unlink(missing_ok=True)
        raise SourceError(
            f"what the Hub sends is not what it lists ({file.digest}, {file.nbytes} bytes), twice; nothing of it was used",
            where=where,
        )

    def _download(self, name: str, file: HubFile, where: str) -> Path:
        from huggingface_hub import constants, hf_hub_download

        folder = self._spool or Path(constants.HF_HUB_CACHE)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if file.nbytes + _SPARE_BYTES > free:
            raise SourceError(
                f"has {file.nbytes / 1e9:.2f} GB and the disk of {folder} {free / 1e9:.2f} GB free; make room",
                where=where,
                remedy=", or give a smaller {ahead}",
            )

        def download() -> str:
            more: dict[str, Any] = {} if self._spool is None else {"local_dir": self._spool}
            more["tqdm_class"] = silent_bar(self._watch)
            return str(hf_hub_download(self._snapshot.repository, name, revision=self._snapshot.commit, **more))

        return Path(persistently(download, where, SourceError))

    def _is_right(self, path: Path, file: HubFile) -> bool:
        """Whether a file has the content that the Hub listed. The library itself compares sizes only."""
        if path.stat().st_size != file.nbytes:
            return False
        digest = (
            hashlib.sha256() if file.sha256 is not None else hashlib.sha1(f"blob {file.nbytes}\0".encode(), usedforsecurity=False)
        )
        with open(path, "rb") as content:
            while chunk := content.read(_CHUNK):
                digest.update(chunk)
                self._watch()
        return digest.hexdigest() == (file.sha256 or file.git)

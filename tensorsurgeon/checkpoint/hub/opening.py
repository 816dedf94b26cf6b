"""A model on the Hub as a store: small files in the library's cache, headers of shards by ranges of bytes.

The files of a commit never change, so that what the cache holds of it is as good as the Hub. A commit that is whole in the
cache is read from there and the Hub is not asked, not even whether the branch has moved on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Final

from tensorsurgeon.checkpoint.header import ShardHeader, header_bytes, parse_header, read_header
from tensorsurgeon.checkpoint.hub.faults import FIRST_WAITS
from tensorsurgeon.checkpoint.hub.repository import ask_snapshot, cached_snapshot, fetch_into_cache, is_offline, read_range
from tensorsurgeon.checkpoint.hub.snapshot import HubAddress, HubFile, Snapshot
from tensorsurgeon.checkpoint.side_files import SideFiles, holds_other_weights, lies_hidden, module_folders, side_files
from tensorsurgeon.errors import CheckpointError, HeaderError

logger = logging.getLogger(__name__)

# What is asked for before it is known how long the header is: most headers of a large model's shards are longer.
_FIRST_BYTES: Final = 16 << 10
_CONNECTIONS: Final = 8
_MODULES: Final = "modules.json"
_INDEX: Final = ".safetensors.index.json"
_SHARD: Final = ".safetensors"


class HubFolder:
    """A commit on the Hub whose small files lie in ``root``, a folder of the library's cache."""

    def __init__(self, snapshot: Snapshot, root: Path) -> None:
        self.snapshot = snapshot
        self.root = root

    def __str__(self) -> str:
        return str(self.snapshot)

    def names(self) -> set[str]:
        return {name for name in self.snapshot.files if "/" not in name}

    def header(self, name: str) -> ShardHeader:
        if (self.root / name).exists():
            return read_header(self.root / name)
        return self._headers[name]

    @cached_property
    def _headers(self) -> Mapping[str, ShardHeader]:
        """Of every file that may be a shard and is not here, asked for side by side."""
        names = [name for name in sorted(self.names()) if name.endswith(_SHARD) and not (self.root / name).exists()]
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="hub") as pool:
            return dict(zip(names, pool.map(self._remote_header, names), strict=True))

    def _remote_header(self, name: str) -> ShardHeader:
        where, nbytes = self.snapshot.where(name), self.snapshot.files[name].nbytes
        if nbytes < 8:
            raise HeaderError(f"{nbytes} bytes is too short for a safetensors file", where=where)
        begin = read_range(self.snapshot, name, 0, min(nbytes, _FIRST_BYTES))
        length = 8 + header_bytes(begin[:8], nbytes, where)
        raw = begin[:length]
        if length > len(raw):
            raw += read_range(self.snapshot, name, len(raw), length)
        try:
            return parse_header(raw[8:], nbytes, self.root / name)
        except HeaderError as error:
            raise HeaderError(error.message, where=where) from error.__cause__

    def side_files(self, own: set[str]) -> SideFiles:
        here = side_files(self.root, own)
        modules = module_folders(self.root)
        left = {name for name in self.snapshot.files if name not in own and holds_other_weights(name, modules)}
        return here._replace(left_behind=tuple(sorted({*here.left_behind, *left})))


def find_on_the_hub(address: HubAddress, *, may_be_path: bool = False) -> HubFolder:
    """The commit that an address means, with its small files here; CheckpointError says why that cannot be.

    What ``may_be_path`` too is not waited for where the Hub cannot be reached.
    """
    cached = cached_snapshot(address)
    if cached is not None:
        snapshot, folder, is_listed = cached
        if (is_listed or is_offline()) and _is_whole(snapshot, folder):
            logger.info("%s: read from the cache, %s", address, folder)
            return HubFolder(snapshot, folder)
    if is_offline():
        raise CheckpointError(
            "is not complete in the cache, and the Hub may not be asked (HF_HUB_OFFLINE is set)", where=str(address)
        )
    snapshot = ask_snapshot(address, () if may_be_path else FIRST_WAITS)
    if not any(name.endswith(_SHARD) for name in snapshot.files):
        shown = ", ".join(sorted(snapshot.files)[:8])
        raise CheckpointError(f"holds no .safetensors file (found: {shown or 'nothing'})", where=str(snapshot))
    modules: set[str] = set()
    if _MODULES in snapshot.files:
        modules = module_folders(fetch_into_cache(snapshot, [_MODULES]))
    return HubFolder(snapshot, fetch_into_cache(snapshot, _small_files(snapshot.files, modules)))


def _small_files(files: Iterable[str], modules: set[str]) -> list[str]:
    """What is fetched to plan with: all that travels along, and the index, but no weights."""
    return [
        name
        for name in sorted(files)
        if ("/" not in name and name.endswith(_INDEX)) or not (lies_hidden(name) or holds_other_weights(name, modules))
    ]


def _is_whole(snapshot: Snapshot, folder: Path) -> bool:
    """Whether everything that a conversion reads lies in the cache, as large as it has to be."""
    from tensorsurgeon.checkpoint.folder import open_store

    def is_here(name: str, file: HubFile) -> bool:
        path = folder / name
        return path.exists() and path.stat().st_size == file.nbytes

    wanted = _small_files(snapshot.files, module_folders(folder))
    if not all(is_here(name, snapshot.files[name]) for name in wanted):
        return False
    try:
        here = open_store(_Here(snapshot, folder))
    except CheckpointError:
        return False
    return all(is_here(shard.path.name, snapshot.files[shard.path.name]) for shard in here.shards)


class _Here(HubFolder):
    """The same without the Hub: a shard that is not here is a missing one."""

    def names(self) -> set[str]:
        return {name for name in super().names() if (self.root / name).exists()}

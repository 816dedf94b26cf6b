"""Where the files of a checkpoint lie. A folder is one place; a commit on the Hub is another (``hub/opening.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from tensorsurgeon.checkpoint.header import ShardHeader, read_header
from tensorsurgeon.checkpoint.hub.snapshot import Snapshot
from tensorsurgeon.checkpoint.side_files import SideFiles, side_files


class Store(Protocol):
    """What a checkpoint is opened from. Every file but the weights can be read in the folder ``root``."""

    @property
    def root(self) -> Path:
        """The folder with the small files; the weights may lie in it, or elsewhere."""
        ...

    @property
    def snapshot(self) -> Snapshot | None:
        """The commit on the Hub whose files these are; None for a folder of one's own."""
        ...

    def __str__(self) -> str:
        """How messages name it."""
        ...

    def names(self) -> set[str]:
        """Every file directly in it, weights included."""
        ...

    def header(self, name: str) -> ShardHeader:
        """The checked header of a shard, without its data; HeaderError says what is wrong with it."""
        ...

    def side_files(self, own: set[str]) -> SideFiles:
        """What travels along with the weights, what stays behind, of all that is not in ``own``."""
        ...


class Folder:
    """A folder on this machine."""

    snapshot = None

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def names(self) -> set[str]:
        return {path.name for path in self.root.iterdir()}

    def header(self, name: str) -> ShardHeader:
        return read_header(self.root / name)

    def side_files(self, own: set[str]) -> SideFiles:
        return side_files(self.root, own)

"""The index of a sharded checkpoint: which tensor lies in which file, and whether the files agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tensorsurgeon.checkpoint.header import ShardHeader
from tensorsurgeon.checkpoint.small_files import MAX_INDEX_BYTES, Stamp, read_json
from tensorsurgeon.errors import IndexMismatchError

# Linux and macOS take no longer name of one file.
_MAX_FILE_NAME = 255


class Index(NamedTuple):
    """A read index; ``total_size`` is what it says, whatever that is, and None where it says nothing."""

    path: Path
    weight_map: dict[str, str]
    total_size: Any
    stamp: Stamp


def read_index(path: Path) -> Index:
    """The index at ``path``; IndexMismatchError if it is none, or leads out of its folder."""
    _, document, stamp = read_json(path, MAX_INDEX_BYTES, IndexMismatchError)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise IndexMismatchError("has no weight_map from tensor names to file names", where=str(path))
    for name, file in weight_map.items():
        _check_file_name(name, file, path)
    metadata = document.get("metadata")
    return Index(path, weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None, stamp)


def _check_file_name(name: str, file: str, path: Path) -> None:
    if not file or file in (".", "..") or "/" in file or "\\" in file or "\0" in file:
        raise IndexMismatchError(
            f"{name}: the index points to {file!r}, outside the folder; shards must lie beside the index", where=str(path)
        )
    if len(file.encode(errors="replace")) > _MAX_FILE_NAME or any("\ud800" <= letter <= "\udfff" for letter in file):
        shown = ascii(file[:40])
        raise IndexMismatchError(f"{name}: no file can be called {shown}..., to which the index points", where=str(path))


def compare_index(weight_map: Mapping[str, str], owner: Mapping[str, int], shards: Sequence[ShardHeader]) -> list[str]:
    """Where the index and the shards contradict each other; ``owner`` is the number of the shard that has a tensor."""
    faults = []
    for name, file in weight_map.items():
        number = owner.get(name)
        if number is None:
            faults.append(f"{name}: the index says it lies in {file}, but no shard has it")
        elif shards[number].path.name != file:
            faults.append(f"{name}: the index says it lies in {file}, but it is in {shards[number].path.name}")
    for name, number in owner.items():
        if name not in weight_map:
            faults.append(f"{name}: lies in {shards[number].path.name}, but the index does not name it")
    return faults

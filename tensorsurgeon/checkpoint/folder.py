"""The facts of a checkpoint on disk: headers, index, config and side files, without a byte of weights.

A checkpoint is a folder with or without an index, a single ``.safetensors`` file, or a snapshot of the Hub's cache
(whose files are symbolic links to blobs).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import xxhash

from tensorsurgeon.checkpoint.config_file import CONFIG_NAME, read_config
from tensorsurgeon.checkpoint.header import NO_STAMP, ShardHeader
from tensorsurgeon.checkpoint.hub.snapshot import HubAddress, Snapshot, hub_address
from tensorsurgeon.checkpoint.index import Index, compare_index, read_index
from tensorsurgeon.checkpoint.layout import STEMS
from tensorsurgeon.checkpoint.places import Location, Locations, in_order
from tensorsurgeon.checkpoint.quantization import with_quantization_beside
from tensorsurgeon.checkpoint.side_files import SideFiles
from tensorsurgeon.checkpoint.small_files import Stamp, unreadable
from tensorsurgeon.checkpoint.store import Folder, Store
from tensorsurgeon.checkpoint.weight_files import shards_without_index
from tensorsurgeon.errors import CheckpointError, IndexMismatchError, MissingTensorError, SourceError, did_you_mean
from tensorsurgeon.tensors.names import natural_key
from tensorsurgeon.tensors.spec import SpecMap

RECORD_NAME = "surgeon.json"
STATE_FOLDER = ".surgeon"
INDEX_NAMES: Final = tuple(f"{stem}.safetensors.index.json" for stem in STEMS)


@dataclass(frozen=True, slots=True)
class Oddity:
    """A fault that does not stop a reader: of which kind, at which tensor or file, the sentence, and the value that is odd."""

    kind: Literal["total-size", "index", "missing-shard", "file"]
    where: str
    text: str
    value: Any = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that can be known without reading weights.

    ``specs`` are in natural order of names, whatever shard each lies in, and carry the model's config.
    ``locations`` has one entry per spec, in that order. ``oddities`` are faults that do not stop a reader.
    ``side_files`` are paths relative to ``root``; ``left_behind`` are files that a conversion does not take along.
    ``stamps`` are what the file system said of each file that was looked at, by relative path. ``snapshot`` is the commit on
    the Hub that it is; its small files lie in ``root``, and its shards may, or not.
    """

    root: Path
    shards: tuple[ShardHeader, ...]
    specs: SpecMap
    locations: Locations
    metadata: dict[str, str]
    config_text: bytes | None
    side_files: tuple[str, ...]
    left_behind: tuple[str, ...]
    oddities: tuple[Oddity, ...]
    has_index: bool
    # A single file was named: its folder is not the checkpoint.
    is_single_file: bool = False
    stamps: Mapping[str, Stamp] = field(default_factory=dict, repr=False)
    snapshot: Snapshot | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """How a person calls it: its folder, or the model on the Hub and the commit."""
        return str(self.root if self.snapshot is None else self.snapshot)

    @property
    def identity(self) -> dict[str, list[Any]]:
        """By what each file is known again: on the Hub its digest, on this machine what the file system says of it."""
        if self.snapshot is None:
            return {name: [stamp.nbytes, stamp.modified_ns, stamp.inode] for name, stamp in self.stamps.items()}
        names = {*self.stamps, *(shard.path.name for shard in self.shards)} & self.snapshot.files.keys()
        return {name: [self.snapshot.files[name].nbytes, self.snapshot.files[name].digest] for name in sorted(names)}

    @property
    def config(self) -> Mapping[str, Any]:
        return self.specs.config

    @property
    def stem(self) -> str:
        """What the weight files are called, as libraries look for them: ``model``, unless all bear the name of another."""
        for stem in STEMS[1:]:
            if all(re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.safetensors", shard.path.name) for shard in self.shards):
                return stem
        return STEMS[0]

    @property
    def weight_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def location(self, name: str) -> Location:
        """Where a tensor lies, by name; builds no table, so not for loops."""
        return self.locations[list(self.specs).index(name)]

    def fingerprint(self) -> str:
        """Changes when a header, the config or a side file changes, and with no time: the same source has one, wherever.

        Bytes of weights are not read for it; ``refuse_changes`` notices when they are written.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.path.name} {shard.file_bytes}\n".encode())
            digest.update(shard.raw)
        digest.update(self.config_text or b"")
        for name in self.side_files:
            content = xxhash.xxh3_128()
            with open(self.root / name, "rb") as file:
                while chunk := file.read(1 << 20):
                    content.update(chunk)
            digest.update(f"{name} {content.hexdigest()}\n".encode())
        return digest.hexdigest()

    def refuse_changes(self) -> None:
        """Raise SourceError if any file was written, replaced or removed since the checkpoint was opened."""
        for name, stamp in self.stamps.items():
            path = self.root / name
            try:
                found = Stamp.of(os.stat(path))
            except OSError as error:
                remedy = "; put the very file back and run the same command with {resume}"
                said = f"is gone since the plan was made ({error.strerror})"
                raise SourceError(said, where=str(path), can_resume=False, remedy=remedy) from error
            if found != stamp:
                what = "was replaced by another file" if found.inode != stamp.inode else "was written"
                raise SourceError(
                    f"the source changed: this file {what} after the plan was made, so what was read of it may be of two kinds; "
                    "make the plan again, and write it to a new folder",
                    where=str(path),
                    can_resume=False,
                )


def open_checkpoint(path: str | os.PathLike[str], *, tolerant: bool = False) -> Checkpoint:
    """Read and check the headers, index and config of a checkpoint: a folder, a file, or a model on the Hub by name.

    What is there wins over a model on the Hub of the same name. Raises CheckpointError and its kin for anything that a reader
    would stumble over. With ``tolerant`` a wrong index becomes an oddity instead, so that a broken checkpoint can be looked at.
    """
    text, path = os.fspath(path), Path(path)
    try:
        if path.is_dir():
            os.scandir(path).close()  # one that cannot be listed is named itself, and no file in it
            if (path / STATE_FOLDER / "run.json").exists() and not tolerant:
                raise _unfinished(path)
            return open_store(Folder(path), tolerant)
        if path.suffix == ".safetensors" and path.exists():
            if (path.parent / STATE_FOLDER / "run.json").exists() and not tolerant:
                raise _unfinished(path.parent)
            return _assemble(Folder(path.parent), [path.name], [], None, tolerant, is_single=True)
        if (address := hub_address(text)) is not None and not path.exists():
            return _open_on_the_hub(address, text, tolerant)
    except OSError as error:
        raise CheckpointError(unreadable(error), where=str(error.filename or path)) from error
    except ValueError as error:
        # A path with a null byte, say.
        raise CheckpointError(f"is no path of a checkpoint: {error}", where=ascii(str(path))) from error
    if not path.exists():
        wanted = "give a local checkpoint, or owner/name of a model on the Hub"
        raise CheckpointError(f"{path}: no such file or folder{_meant(path)}; {wanted}")
    raise CheckpointError("is neither a folder nor a .safetensors file", where=str(path))


def _open_on_the_hub(address: HubAddress, text: str, tolerant: bool) -> Checkpoint:
    from tensorsurgeon.checkpoint.hub.opening import find_on_the_hub

    path = Path(text)
    try:
        store = find_on_the_hub(address, may_be_path=path.parent.is_dir() and not text.startswith("hf:"))
    except CheckpointError as error:
        if error.where != str(address) or text.startswith("hf:"):
            raise
        # It may have been meant as a folder.
        said = f"no such file or folder here, and as a model on the Hub: {error.message}{_meant(path)}"
        raise type(error)(said, where=text, remedy=error.remedy) from error
    return open_store(store, tolerant)


def _unfinished(folder: Path) -> CheckpointError:
    said = f"holds an unfinished run of surgeon (see {STATE_FOLDER}/)"
    return CheckpointError(said, where=str(folder), remedy="; finish it with {resume} before using it")


def _meant(path: Path) -> str:
    """A clause with names like it in the same folder; empty if there are none."""
    try:
        siblings = [p.name for p in path.absolute().parent.iterdir()]
    except OSError:
        siblings = []
    hint = did_you_mean(path.name, siblings) if len(siblings) <= 1000 else ""
    return hint if "did you mean" in hint else ""


def open_store(store: Store, tolerant: bool = False) -> Checkpoint:
    """The checkpoint that a store holds, as ``open_checkpoint`` reads it."""
    present = store.names()
    index_name = next((name for name in INDEX_NAMES if name in present), None)
    if index_name is not None:
        index = read_index(store.root / index_name)
        wanted = sorted(set(index.weight_map.values()), key=natural_key)
        if not wanted and not tolerant:
            raise IndexMismatchError("names no tensor at all; the index is stale", where=str(index.path))
        missing = [name for name in wanted if name not in present or _is_broken_link(store, name)]
        if missing and not tolerant:
            named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            said = f"the index names {len(wanted)} shards, but {named} missing; download the rest"
            raise MissingTensorError(said, where=str(store))
        notes = [Oddity("missing-shard", name, f"the index names {name}, which is missing") for name in missing]
        return _assemble(store, [name for name in wanted if name not in set(missing)], notes, index, tolerant)
    return _assemble(store, shards_without_index(present, str(store)), [], None, tolerant)


def _is_broken_link(store: Store, name: str) -> bool:
    path = store.root / name
    return path.is_symlink() and not path.exists()


def _assemble(
    store: Store,
    names: Sequence[str],
    notes: list[Oddity],
    index: Index | None,
    tolerant: bool,
    *,
    is_single: bool = False,
) -> Checkpoint:
    root = store.root
    shards = tuple(map(store.header, names))
    owner: dict[str, int] = {}
    metadata: dict[str, str] = {}
    for number, shard in enumerate(shards):
        for key, value in shard.metadata.items():
            metadata.setdefault(key, value)
        for spec in shard.specs:
            if spec.name in owner:
                raise IndexMismatchError(
                    f"{spec.name}: lies in two shards, {shards[owner[spec.name]].path.name} and {shard.path.name}",
                    where=str(store),
                )
            owner[spec.name] = number
    total = sum(spec.nbytes for shard in shards for spec in shard.specs)
    oddities = [*notes, *(_index_oddities(index, total, owner, shards) if index else [])]
    faults = [oddity for oddity in oddities if oddity.kind == "index"]
    if faults and not tolerant:
        more = f" ({len(faults)} such tensors)" if len(faults) > 1 else ""
        raise IndexMismatchError(f"{faults[0]}{more}; the index is stale", where=str(index.path if index else store))
    config_text, config, stamps = read_config(root)
    if index is not None:
        # It names every tensor once more, and memory is tightest while they are put in order.
        index.weight_map.clear()
    found, locations = in_order(shards, owner)
    config = config if is_single else with_quantization_beside(config, root, found)
    # Of the folder of a single file only the config belongs to it for certain.
    own = {*names, *INDEX_NAMES, CONFIG_NAME, RECORD_NAME}
    others = SideFiles({}, (), ()) if is_single else store.side_files(own)
    stamps |= {shard.path.name: shard.stamp for shard in shards if shard.stamp != NO_STAMP} | others.kept
    stamps |= {} if index is None else {index.path.name: index.stamp}
    return Checkpoint(
        root=root,
        shards=shards,
        specs=SpecMap(found, config),
        locations=locations,
        metadata=metadata or {"format": "pt"},
        config_text=config_text,
        side_files=tuple(others.kept),
        left_behind=others.left_behind,
        oddities=(*oddities, *(Oddity("file", text.split(" is ")[0], text) for text in others.strange)),
        has_index=index is not None,
        is_single_file=is_single,
        stamps=stamps,
        snapshot=store.snapshot,
    )


def _index_oddities(index: Index, total: int, owner: dict[str, int], shards: Sequence[ShardHeader]) -> list[Oddity]:
    said = index.total_size
    text = f"the index says total_size {said}, but the tensors have {total} bytes"
    sizes = [] if said is None or said == total else [Oddity("total-size", index.path.name, text, said)]
    faults = compare_index(index.weight_map, owner, shards)
    return [*sizes, *(Oddity("index", fault.partition(": the index ")[0].partition(": lies in ")[0], fault) for fault in faults)]

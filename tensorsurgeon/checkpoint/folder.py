"""The facts of a checkpoint on disk: headers, index, config and side files, without a byte of weights.

A checkpoint is a folder with or without an index, a single ``.safetensors`` file, or a snapshot of the Hub's cache
(whose files are symbolic links to blobs).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tensorsurgeon.checkpoint.header import ShardHeader, read_header
from tensorsurgeon.checkpoint.layout import INDEX_NAME
from tensorsurgeon.checkpoint.quantization import with_quantization_beside
from tensorsurgeon.errors import CheckpointError, ConfigError, IndexMismatchError, MissingTensorError, did_you_mean
from tensorsurgeon.tensors.names import canonical_order, natural_key
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

RECORD_NAME = "surgeon.json"
STATE_FOLDER = ".surgeon"
# Weights in other containers beside the checkpoint would be stale copies of what was changed here.
_OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|gguf|partial|safetensors\.index\.json)"
    r"|(pytorch_model|model|consolidated|tf_model|flax_model)[^/]*\.(bin|pt|pth|h5|msgpack|onnx|ckpt)"
    r"|(pytorch_model|consolidated)[^/]*\.index\.json"
)
_HIDDEN = {".git", ".cache", STATE_FOLDER}


class Location(NamedTuple):
    """Where a tensor's bytes lie: which shard, first byte in that file."""

    shard: int
    offset: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that can be known without reading weights.

    ``specs`` are in natural order of names, whatever shard each lies in, and carry the model's config.
    ``locations`` has one entry per spec, in that order. ``oddities`` are faults that do not stop a reader.
    ``side_files`` are paths relative to ``root``; ``left_behind`` are files that a conversion does not take along.
    """

    root: Path
    shards: tuple[ShardHeader, ...]
    specs: SpecMap
    locations: tuple[Location, ...]
    metadata: dict[str, str]
    config_text: bytes | None
    side_files: tuple[str, ...]
    left_behind: tuple[str, ...]
    oddities: tuple[str, ...]
    has_index: bool
    # A single file was named: its folder is not the checkpoint.
    is_single_file: bool = False

    @property
    def config(self) -> Mapping[str, Any]:
        return self.specs.config

    @property
    def weight_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def location(self, name: str) -> Location:
        """Where a tensor lies, by name; builds no table, so not for loops."""
        return self.locations[list(self.specs).index(name)]

    def fingerprint(self) -> str:
        """Changes when a header, a size, a time stamp, the config or a side file changes."""
        digest = hashlib.sha256()
        for shard in self.shards:
            info = os.stat(shard.path)
            digest.update(f"{shard.path.name} {info.st_size} {info.st_mtime_ns}\n".encode())
            digest.update(shard.raw)
        digest.update(self.config_text or b"")
        for name in self.side_files:
            info = os.stat(self.root / name)
            digest.update(f"{name} {info.st_size} {info.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def open_checkpoint(path: str | os.PathLike[str], *, tolerant: bool = False) -> Checkpoint:
    """Read and check the headers, index and config of a checkpoint.

    Raises CheckpointError and its kin for anything that a reader would stumble over. With ``tolerant`` a wrong index
    becomes an oddity instead, so that a broken checkpoint can be looked at.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path, tolerant)
        if path.suffix == ".safetensors" and path.exists():
            if (path.parent / STATE_FOLDER / "run.json").exists() and not tolerant:
                raise CheckpointError(_unfinished_message(), where=str(path.parent))
            return _assemble(path.parent, [path], [], None, tolerant, single=path)
    except PermissionError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(error.filename or path)) from error
    if not path.exists():
        raise CheckpointError(_missing_message(path))
    raise CheckpointError("is neither a folder nor a .safetensors file", where=str(path))


def _unfinished_message() -> str:
    return f"holds an unfinished run of surgeon (see {STATE_FOLDER}/); finish it with --resume before using it"


def _missing_message(path: Path) -> str:
    try:
        siblings = [p.name for p in path.absolute().parent.iterdir()]
    except OSError:
        siblings = []
    hint = did_you_mean(path.name, siblings) if len(siblings) <= 1000 else ""
    return f"{path}: no such file or folder{hint if 'did you mean' in hint else ''}; give a local checkpoint"


def _open_folder(folder: Path, tolerant: bool) -> Checkpoint:
    if (folder / STATE_FOLDER / "run.json").exists() and not tolerant:
        raise CheckpointError(_unfinished_message(), where=str(folder))
    present = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors")
    index_path = folder / INDEX_NAME
    if index_path.exists():
        weight_map, index_notes = _read_index(index_path)
        wanted = sorted(set(weight_map.values()), key=natural_key)
        if not wanted and not tolerant:
            raise IndexMismatchError("names no tensor at all; the index is stale", where=str(index_path))
        missing = [name for name in wanted if not (folder / name).exists()]
        if missing and not tolerant:
            named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise MissingTensorError(
                f"the index names {len(wanted)} shards, but {named} missing; download the rest", where=str(folder)
            )
        notes = [f"the index names {name}, which is missing" for name in missing] + index_notes
        paths = [folder / name for name in wanted if name not in set(missing)]
        return _assemble(folder, paths, notes, weight_map, tolerant)
    if not present:
        others = sorted(p.name for p in folder.iterdir())[:8]
        raise CheckpointError(f"holds no .safetensors file (found: {', '.join(others) or 'nothing'})", where=str(folder))
    _refuse_incomplete(folder, present)
    return _assemble(folder, [folder / name for name in sorted(present, key=natural_key)], [], None, tolerant)


def _refuse_incomplete(folder: Path, present: list[str]) -> None:
    """Without an index only the names can tell that shards are missing: ``model-00002-of-00005``."""
    for name in present:
        found = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", name)
        if found is None:
            continue
        stem, _, count = found.groups()
        wanted = [f"{stem}-{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
        missing = [w for w in wanted if w not in present]
        if missing:
            raise MissingTensorError(
                f"{name} belongs to {int(count)} shards, of which {len(missing)} are missing, first {missing[0]}",
                where=str(folder),
            )


def _read_index(path: Path) -> tuple[dict[str, str], list[str]]:
    try:
        document = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise IndexMismatchError(f"is not valid JSON: {error}", where=str(path)) from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise IndexMismatchError("has no weight_map from tensor names to file names", where=str(path))
    for name, file in weight_map.items():
        if not file or file in (".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise IndexMismatchError(
                f"{name}: the index points to {file!r}, outside the folder; shards must lie beside the index",
                where=str(path),
            )
    metadata = document.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, [] if total is None else [f"total_size:{total}"]


def _assemble(
    root: Path,
    paths: list[Path],
    notes: list[str],
    weight_map: dict[str, str] | None,
    tolerant: bool,
    single: Path | None = None,
) -> Checkpoint:
    shards = tuple(read_header(path) for path in paths)
    owner: dict[str, int] = {}
    places: dict[str, tuple[TensorSpec, Location]] = {}
    metadata: dict[str, str] = {}
    for number, shard in enumerate(shards):
        for key, value in shard.metadata.items():
            metadata.setdefault(key, value)
        for entry in shard.entries:
            name = entry.spec.name
            if name in owner:
                raise IndexMismatchError(
                    f"{name}: lies in two shards, {shards[owner[name]].path.name} and {shard.path.name}", where=str(root)
                )
            owner[name] = number
            places[name] = entry.spec, Location(number, entry.offset)
    found = [places[name] for name in canonical_order(places)]
    total = sum(spec.nbytes for spec, _ in found)
    oddities = []
    for note in notes:
        if note.startswith("total_size:"):
            if note != f"total_size:{total}":
                oddities.append(f"the index says total_size {note[11:]}, but the tensors have {total} bytes")
        else:
            oddities.append(note)
    if weight_map is not None:
        faults = _compare_index(weight_map, owner, shards)
        if faults and not tolerant:
            more = f" ({len(faults)} such tensors)" if len(faults) > 1 else ""
            raise IndexMismatchError(f"{faults[0]}{more}; the index is stale", where=str(root / INDEX_NAME))
        oddities += faults
    config_text, config = _read_config(root if single is None or (root / "config.json").exists() else None)
    config = config if single else with_quantization_beside(config, root, (spec for spec, _ in found))
    # Of the folder of a single file only the config belongs to it for certain.
    side_files, left_behind, strange = _other_files(root, {p.name for p in paths}) if single is None else ((), (), [])
    oddities += strange
    return Checkpoint(
        root=root,
        shards=shards,
        specs=SpecMap((spec for spec, _ in found), config),
        locations=tuple(location for _, location in found),
        metadata=metadata or {"format": "pt"},
        config_text=config_text,
        side_files=side_files,
        left_behind=left_behind,
        oddities=tuple(oddities),
        has_index=weight_map is not None,
        is_single_file=single is not None,
    )


def _compare_index(weight_map: dict[str, str], owner: dict[str, int], shards: tuple[ShardHeader, ...]) -> list[str]:
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


def _read_config(root: Path | None) -> tuple[bytes | None, dict[str, Any]]:
    if root is None or not (root / "config.json").exists():
        return None, {}
    path = root / "config.json"
    text = path.read_bytes()
    try:
        config = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"is not valid JSON: {error}", where=str(path)) from error
    if not isinstance(config, dict):
        raise ConfigError(f"must hold a JSON object, found {type(config).__name__}", where=str(path))
    return text, config


def _other_files(root: Path, shard_names: set[str]) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
    """Files that are not weights of this checkpoint: those that travel along, those that stay behind, and oddities."""
    own = shard_names | {INDEX_NAME, "config.json", RECORD_NAME}
    kept, left, strange = [], [], []
    for folder, folders, files in os.walk(root, followlinks=False, onerror=_raise):
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else f"{relative}/"
        folders[:] = sorted(f for f in folders if f not in _HIDDEN)
        links = [f for f in folders if os.path.islink(os.path.join(folder, f))]
        strange += [f"{prefix}{f}/ is a link to a folder and stays behind" for f in links]
        for file in sorted(files):
            name = prefix + file
            if name in own:
                continue
            if _OTHER_WEIGHTS.fullmatch(file):
                left.append(name)
            elif os.path.isfile(path := os.path.join(folder, file)):
                if not os.access(path, os.R_OK):
                    # Now, and not after an hour, when it is to be copied.
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
                kept.append(name)
            else:
                strange.append(f"{name} is a broken link or no regular file and stays behind")
    return tuple(kept), tuple(left), strange


def _raise(error: OSError) -> None:
    raise error

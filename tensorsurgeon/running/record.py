"""``surgeon.json``: what made a checkpoint, and a digest of every byte range of its shards and of every other file.

It holds no time and no machine, so that the same run writes the same record everywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import xxhash

from tensorsurgeon.checkpoint.folder import RECORD_NAME
from tensorsurgeon.checkpoint.sink import publish_bytes
from tensorsurgeon.checkpoint.small_files import parse_json, read_small, unreadable
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.version import __version__

_ALGORITHM = "xxh3_64"


# Records are read that others may have made.
MAX_RECORD_BYTES: Final = 256 << 20


class Range(NamedTuple):
    """A range of bytes of one shard and its digest."""

    shard: str
    offset: int
    nbytes: int
    digest: str


def written_ranges(plan: Plan, digests: dict[int, list[str]]) -> list[Range]:
    """Every range that a run wrote, headers included, in file order."""
    names = [shard.name for shard in plan.layout.shards]
    ranges = [Range(shard.name, 0, len(shard.header), xxhash.xxh3_64_hexdigest(shard.header)) for shard in plan.layout.shards]
    for number, unit in enumerate(plan.units):
        places = [(w.shard, w.offset, w.nbytes) for w in unit.writes] + [(c.shard, c.offset, c.nbytes) for c in unit.copies]
        for (shard, offset, nbytes), digest in zip(places, digests[number], strict=True):
            ranges.append(Range(names[shard], offset, nbytes, digest))
    ranges.sort(key=lambda r: (r.shard, r.offset))
    return ranges


def file_digests(plan: Plan, folder: Path) -> dict[str, list[Any]]:
    """Bytes and digest of every file beside the shards: config, index, and side files as they lie in ``folder``.

    Not of logs, which tell of times, so that two runs leave one record.
    """
    index = {} if plan.layout.index_json is None else {plan.layout.index_name: plan.layout.index_json}
    found = {name: _sized(content) for name, content in {**plan.files.contents, **index}.items()}
    for name in plan.files.copied:
        found[name] = digest_of_file(folder / name)
    return dict(sorted(found.items()))


def _sized(content: bytes) -> list[Any]:
    return [len(content), xxhash.xxh3_64_hexdigest(content)]


def digest_of_file(path: Path) -> list[Any]:
    """``[bytes, digest]`` of a file, read a megabyte at a time; OSError if it cannot be read."""
    digest = xxhash.xxh3_64()
    nbytes = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            nbytes += len(chunk)
    return [nbytes, digest.hexdigest()]


def record_bytes(plan: Plan, digests: dict[int, list[str]], folder: Path) -> bytes:
    """The content of ``surgeon.json`` for a finished run whose side files lie in ``folder``."""
    shards: dict[str, list[list[Any]]] = {}
    for shard, offset, nbytes, digest in written_ranges(plan, digests):
        shards.setdefault(shard, []).append([offset, nbytes, digest])
    document = {
        "tensorsurgeon": __version__,
        "fingerprint": plan.fingerprint,
        "recipe": [f"{step!r}" for step in plan.steps],
        "source": {"tensors": len(plan.source.specs), "bytes": plan.source.weight_bytes, **_on_the_hub(plan)},
        **({"calibration": plan.calibration} if plan.calibration else {}),
        **({"logs": list(plan.extra_files)} if plan.extra_files else {}),
        "digest": _ALGORITHM,
    }
    head = json.dumps(document, indent=1)[:-2]
    return (head + _block("files", file_digests(plan, folder)) + _block("shards", shards) + "\n}\n").encode()


def _on_the_hub(plan: Plan) -> dict[str, Any]:
    """Which commit of which model the source is, and the digests that its shards were found to have."""
    snapshot = plan.source.snapshot
    if snapshot is None:
        return {}
    repository, revision, commit, files = snapshot
    shards = {shard.path.name: files[shard.path.name].digest for shard in plan.source.shards}
    return {"hub": {"repository": repository, "revision": revision, "commit": commit, "shards": shards}}


def _block(key: str, entries: dict[str, list[Any]]) -> str:
    """A mapping with one line for each entry: a range of a shard is three numbers and not four lines."""
    rows = (f"  {json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in entries.items())
    return f',\n "{key}": {{\n' + ",\n".join(rows) + "\n }"


def add_files(folder: Path, contents: Mapping[str, bytes | None]) -> None:
    """Let the record of a finished run know files that were written beside the checkpoint since; None: know it no more.

    What the record knows is this program's own (``ownership``), and verified. Nothing happens where there is no record.
    """
    path = folder / RECORD_NAME
    if not path.is_file() or (record := read_record(folder)) is None or "files" not in record:
        return
    files = {known.name: [known.nbytes, known.digest] for known in recorded_files(record)}
    before = dict(files)
    files |= {name: _sized(content) for name, content in contents.items() if content is not None}
    files = {name: value for name, value in files.items() if contents.get(name, b"") is not None}
    if files == before:
        return
    # Only the block of files is written anew: the rest stays the very text that the run left.
    text = path.read_text()
    start, stop = text.index(',\n "files": {'), text.index(',\n "shards": {')
    publish_bytes(path, (text[:start] + _block("files", dict(sorted(files.items()))) + text[stop:]).encode())


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a checkpoint; None if it has none, CheckpointError if it is damaged."""
    path = folder / RECORD_NAME
    if not os.path.lexists(path):
        return None
    try:
        record = parse_json(read_small(path, MAX_RECORD_BYTES)[0])
        if record["digest"] != _ALGORITHM:
            raise CheckpointError(f"digests are {record['digest']}, but this version knows {_ALGORITHM}", where=str(path))
        list(recorded_ranges(record))
        list(recorded_files(record))
    except OSError as error:
        raise CheckpointError(unreadable(error), where=str(path)) from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"is damaged: {error!r}", where=str(path)) from error
    return dict(record)


def recorded_ranges(record: dict[str, Any]) -> Iterator[Range]:
    """The ranges of a record, in file order."""
    for shard, ranges in record["shards"].items():
        for offset, nbytes, digest in ranges:
            yield Range(str(shard), int(offset), int(nbytes), str(digest))


class FileDigest(NamedTuple):
    """A file beside the shards, its size and its digest."""

    name: str
    nbytes: int
    digest: str


def recorded_files(record: dict[str, Any]) -> Iterator[FileDigest]:
    """The files of a record; none in records of older versions."""
    for name, (nbytes, digest) in record.get("files", {}).items():
        yield FileDigest(str(name), int(nbytes), str(digest))

"""Which files of a target are this program's own: those that a record or a stopped run names, and that nobody changed since.

``--overwrite`` removes these and no other, so that notes, a README written by hand or another model in the same folder
cannot be lost by a word too many on a command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import xxhash

from tensorsurgeon.checkpoint.folder import RECORD_NAME, STATE_FOLDER
from tensorsurgeon.checkpoint.layout import STEMS
from tensorsurgeon.checkpoint.small_files import open_regular
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.machine.threads import in_threads
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.running.journal import read_identity
from tensorsurgeon.running.record import digest_of_file, read_record, recorded_files, recorded_ranges

_CHUNK_BYTES: Final = 1 << 20
PARTIAL: Final = ".partial"
# What else a record may call a log: a stranger's record must not make a person's file ours.
_LOG: Final = re.compile(r"\w+_log\.csv")
_PARTIAL_SHARD: Final = re.compile(rf"({'|'.join(STEMS)})(-\d+-of-\d+)?\.safetensors\.partial")


def files_of(plan: Plan) -> list[str]:
    """Every file that a run of this plan writes, by its path in the target."""
    return sorted(
        {
            *(shard.name for shard in plan.layout.shards),
            *plan.files.contents,
            *plan.files.copied,
            *([plan.layout.index_name] if plan.layout.index_json is not None else []),
            RECORD_NAME,
            *plan.extra_files,
        }
    )


def foreign_files(target: Path) -> list[str]:
    """Files and links below ``target`` that no run wrote, or that were changed since, by relative path."""
    own = own_files(target)
    return [name for name in _present(target) if name not in own]


def own_files(target: Path) -> set[str]:
    """Files below ``target`` that a run wrote and nobody changed since."""
    own = set(_named_by_stopped_run(target))
    if (target / STATE_FOLDER).is_dir():
        # Also where what the run says of itself is damaged.
        own |= {path.name for path in target.iterdir() if _PARTIAL_SHARD.fullmatch(path.name)}
    try:
        record = read_record(target)
    except SurgeonError:
        record = None
    if record is not None:
        own |= {RECORD_NAME, *record["shards"]}
        logs = record.get("logs")
        own |= {name for name in logs if isinstance(name, str) and _LOG.fullmatch(name)} if isinstance(logs, list) else set()
        own |= {found.name for found in recorded_files(record) if _digest(target / found.name) == [found.nbytes, found.digest]}
    return own


def remove_own_files(target: Path) -> None:
    """Remove what a run wrote, so that at no moment what is left looks whole, and that a second try knows it again.

    The index goes first, then weights; the record, which names what is ours, last.
    """
    own = own_files(target) & set(_present(target))

    def when(name: str) -> tuple[bool, bool, bool]:
        return name == RECORD_NAME, not name.endswith(".index.json"), not name.endswith(".safetensors")

    for name in sorted(own, key=when):
        (target / name).unlink(missing_ok=True)
    for folder in sorted({parent for name in own for parent in Path(name).parents if parent.name}, reverse=True):
        if not any((target / folder).iterdir()):
            (target / folder).rmdir()


def damaged_files(target: Path, record: dict[str, Any], workers: int) -> list[str]:
    """Files of a finished run that are gone or not what the record says, by relative path."""
    jobs = [(shard, offset, nbytes, digest) for shard, offset, nbytes, digest in recorded_ranges(record)]
    sizes: dict[str, int] = {}
    for shard, offset, nbytes, _ in jobs:
        sizes[shard] = max(sizes.get(shard, 0), offset + nbytes)
    damaged = {name for name, nbytes in sizes.items() if not _has_size(target / name, nbytes)}
    damaged |= {found.name for found in recorded_files(record) if _digest(target / found.name) != [found.nbytes, found.digest]}
    sound = in_threads(lambda job: job[0] in damaged or _range_digest(target / job[0], job[1], job[2]) == job[3], jobs, workers)
    return sorted(damaged.union(job[0] for job, is_sound in zip(jobs, sound, strict=True) if not is_sound))


def _present(target: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(target, followlinks=False):
        relative = os.path.relpath(folder, target)
        prefix = "" if relative == "." else f"{relative}/"
        if not prefix:
            folders[:] = [name for name in folders if name != STATE_FOLDER]
        yield from (prefix + name for name in folders if os.path.islink(os.path.join(folder, name)))
        yield from (prefix + name for name in sorted(files))


def _named_by_stopped_run(target: Path) -> Iterator[str]:
    try:
        files = read_identity(target).get("files", [])
    except SurgeonError:
        return
    for name in files if isinstance(files, list) else []:
        if isinstance(name, str):
            yield name
            yield name + PARTIAL


def _digest(path: Path) -> list[Any] | None:
    try:
        return None if path.is_symlink() else digest_of_file(path)
    except (OSError, ValueError):
        return None


def _has_size(path: Path, nbytes: int) -> bool:
    try:
        return not path.is_symlink() and path.stat().st_size == nbytes
    except (OSError, ValueError):
        return False


def _range_digest(path: Path, offset: int, nbytes: int) -> str | None:
    digest = xxhash.xxh3_64()
    try:
        with open(open_regular(path), "rb") as file:
            file.seek(offset)
            while nbytes > 0 and (chunk := file.read(min(nbytes, _CHUNK_BYTES))):
                digest.update(chunk)
                nbytes -= len(chunk)
    except OSError:
        return None
    return digest.hexdigest() if nbytes == 0 else None

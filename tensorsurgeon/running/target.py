"""The folder that a run writes: what may be in it, and how much room it has."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from tensorsurgeon.checkpoint.folder import RECORD_NAME, STATE_FOLDER, Checkpoint
from tensorsurgeon.checkpoint.layout import INDEX_NAME
from tensorsurgeon.errors import JournalError, TargetError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.running.journal import Journal, has_traces_of_run, has_unfinished_run
from tensorsurgeon.running.record import read_record

# Room for the journal, directory entries and what a file system keeps to itself.
_SPARE_BYTES = 16 << 20


def prepare_target(plan: Plan, target: Path, *, resume: bool, overwrite: bool) -> tuple[Journal, dict[int, list[str]]] | None:
    """Make ``target`` ready for this plan: the open journal and the units that a stopped run says are done.

    None if ``resume`` finds that this very run is already complete. Raises TargetError without touching anything
    if the folder holds something that nobody allowed to replace, is the source, or has too little room.
    """
    refuse_overlap(plan.source, target)
    identity = identity_of(plan)
    try:
        if target.exists() and not target.is_dir():
            raise TargetError("is a file; name a folder", where=str(target))
        present = sorted(os.listdir(target)) if target.is_dir() else []
        if has_traces_of_run(target):
            present.remove(STATE_FOLDER)
        if has_unfinished_run(target) and resume:
            return Journal.resume(target, identity)
        if resume and _is_complete(plan, target):
            shutil.rmtree(target / STATE_FOLDER, ignore_errors=True)
            return None
        if present and not overwrite:
            raise _occupied(target, present, resume)
        if present:
            _refuse_foreign(target, present)
        check_room(plan, target, _folder_bytes(target) if present else 0)
        return Journal.start(target, identity, clear=lambda: _clear(target)), {}
    except OSError as error:
        raise TargetError(f"cannot be used: {error.strerror}", where=str(error.filename or target)) from error


def identity_of(plan: Plan) -> dict[str, Any]:
    """What ``.surgeon/run.json`` says of a run while it lasts, so that only the same run over the same bytes goes on."""
    return {
        "fingerprint": plan.fingerprint,
        "recipe": [repr(step) for step in plan.steps],
        "source": {name: [stamp.nbytes, stamp.modified_ns] for name, stamp in plan.source.stamps.items()},
    }


def refuse_overlap(source: Checkpoint, target: Path) -> None:
    """The source is never modified: refuse a target that is the source, lies in it, or holds it."""
    here, there = target.resolve(), source.root.resolve()
    if here == there:
        raise TargetError("is the source; the source is never modified, name another folder", where=str(target))
    # The files of a Hub snapshot are links to blobs, which lie elsewhere and are just as much the source.
    files = [shard.path for shard in source.shards] + [source.root / name for name in source.side_files]
    real = {Path(os.path.realpath(path)).parent for path in files}
    inside = there in here.parents and not source.is_single_file
    if inside or any(here == folder or here in folder.parents for folder in {there, *real}):
        raise TargetError(f"lies inside the source {source.root}, or the other way round; name another folder", where=str(target))


def _is_complete(plan: Plan, target: Path) -> bool:
    record = read_record(target) if target.is_dir() and not has_unfinished_run(target) else None
    names = [shard.name for shard in plan.layout.shards] + ([INDEX_NAME] if plan.layout.index_json is not None else [])
    if record is None or not all((target / name).is_file() for name in names):
        return False
    if record.get("fingerprint") != plan.fingerprint:
        raise JournalError("holds the finished output of another run", where=str(target), remedy="; replace it with {overwrite}")
    return True


def _occupied(target: Path, present: list[str], resume: bool) -> TargetError:
    if has_unfinished_run(target):
        return TargetError(
            "holds a run that was stopped",
            where=str(target),
            remedy="; continue it with {resume}, or start over with {overwrite}",
        )
    shown = ", ".join(present[:4]) + (", ..." if len(present) > 4 else "")
    nothing = "there is no stopped run to resume; " if resume else ""
    return TargetError(
        f"{nothing}is not empty ({shown})",
        where=str(target),
        remedy="; name another folder, or replace its content with {overwrite}",
    )


def _refuse_foreign(target: Path, present: list[str]) -> None:
    """--overwrite replaces a checkpoint, not somebody's home."""
    known = {"config.json", INDEX_NAME, RECORD_NAME, STATE_FOLDER}
    if not any(name in known or name.endswith((".safetensors", ".partial")) for name in present):
        raise TargetError(
            f"does not look like a checkpoint (it holds {', '.join(present[:4])})",
            where=str(target),
            remedy="; {overwrite} would delete all of it, so empty it yourself or name another folder",
        )


def check_room(plan: Plan, target: Path, freed_bytes: int = 0) -> None:
    """Raise TargetError if the disk has no room for the output."""
    free = free_bytes(target) + freed_bytes
    needed = needed_bytes(plan) + _SPARE_BYTES
    if free < needed:
        raise TargetError(
            f"the output needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; make room or name another disk",
            where=str(target),
        )


def needed_bytes(plan: Plan) -> int:
    """Bytes of every file of the output."""
    return plan.disk_bytes + sum((plan.source.root / name).stat().st_size for name in plan.files.copied)


def free_bytes(target: Path) -> int:
    """Free bytes of the disk that holds ``target``, which need not exist yet."""
    place = target.absolute()
    while not place.exists():
        place = place.parent
    room = os.statvfs(place)
    return room.f_bavail * room.f_frsize


def _folder_bytes(folder: Path) -> int:
    return sum((Path(at) / name).lstat().st_blocks * 512 for at, _, names in os.walk(folder) for name in names)


def _clear(target: Path) -> None:
    """Empty a folder, index first, so that at no moment it looks like a whole checkpoint."""
    (target / INDEX_NAME).unlink(missing_ok=True)
    (target / RECORD_NAME).unlink(missing_ok=True)
    for path in target.iterdir():
        if path.name == STATE_FOLDER:
            # It holds the lock that keeps others out.
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

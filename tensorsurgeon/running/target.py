"""The folder that a run writes: what may be in it, and how much room it has."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tensorsurgeon.checkpoint.folder import STATE_FOLDER, Checkpoint
from tensorsurgeon.checkpoint.sink import refuse_links_below
from tensorsurgeon.errors import JournalError, TargetError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.running.journal import Journal, has_traces_of_run, has_unfinished_run, state_folder
from tensorsurgeon.running.ownership import damaged_files, files_of, foreign_files, remove_own_files
from tensorsurgeon.running.record import read_record

# Room for the journal, directory entries and what a file system keeps to itself.
_SPARE_BYTES = 16 << 20


def spool_folder(target: Path) -> Path:
    """Where the shards of a source on the Hub lie while a run reads them."""
    return state_folder(target) / "spool"


def prepare_target(
    plan: Plan,
    target: Path,
    *,
    resume: bool,
    overwrite: bool,
    workers: int = 1,
    command: Sequence[str] = (),
    beside: Sequence[str] = (),
    spool_bytes: int = 0,
    before: Callable[[], None] = lambda: None,
) -> tuple[Journal, dict[int, list[str]]] | None:
    """Make ``target`` ready for this plan: the open journal and the units that a stopped run says are done.

    None if ``resume`` finds that this very run is already complete. Raises TargetError without touching anything
    if the folder holds something that nobody allowed to replace, is the source, or has too little room. ``command`` is
    kept while the run lasts, so that it can be given again; ``beside`` are files that come with the run's last step;
    ``spool_bytes`` of the source lie beside the output meanwhile. ``before`` is called when the folder may be used and nothing
    in it was touched, and what it raises leaves it so.
    """
    refuse_overlap(plan.source, target)
    identity = identity_of(plan) | {"files": [*files_of(plan), *beside], "command": list(command), "folder": os.getcwd()}
    try:
        if target.exists() and not target.is_dir():
            raise TargetError("is a file; name a folder", where=str(target))
        present = sorted(os.listdir(target)) if target.is_dir() else []
        refuse_links_below(target, identity["files"])
        if has_traces_of_run(target):
            present.remove(STATE_FOLDER)
        if has_unfinished_run(target) and resume:
            before()
            return Journal.resume(target, identity)
        if resume and _is_complete(plan, target, workers):
            shutil.rmtree(target / STATE_FOLDER, ignore_errors=True)
            return None
        if present and not overwrite:
            raise _occupied(target, present, resume)
        if present:
            _refuse_foreign(target)
        check_room(plan, target, _folder_bytes(target) if present else 0, spool_bytes)
        before()
        return Journal.start(target, identity, clear=lambda: _clear(target)), {}
    except OSError as error:
        where = str(error.filename or target)
        raise TargetError(f"cannot be used: {error.strerror}", where=where, remedy=_way_out(error)) from error


def _way_out(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "; make it writable for you, or name another folder"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "; make room or name another disk" if full else "; mend that or name another folder"


def identity_of(plan: Plan) -> dict[str, Any]:
    """What ``.surgeon/run.json`` says of a run while it lasts, so that only the same run over the same bytes goes on."""
    snapshot = plan.source.snapshot
    return {
        "fingerprint": plan.fingerprint,
        **({} if snapshot is None else {"hub": {"repository": snapshot.repository, "commit": snapshot.commit}}),
        "recipe": [repr(step) for step in plan.steps],
        "source": plan.source.identity,
    }


def refuse_overlap(source: Checkpoint, target: Path) -> None:
    """The source is never modified: refuse a target that is the source, lies in it, or holds it.

    Folders are told by device and inode, so that a second path to the same place (a mount, a link) is no way around it.
    """
    here, there = target.resolve(), source.root.resolve()
    above = [identity for folder in (here, *here.parents) if (identity := _identity(folder)) is not None]
    own = _identity(here)
    if here == there or (own is not None and own == _identity(there)):
        raise TargetError("is the source; the source is never modified, name another folder", where=str(target))
    # The files of a Hub snapshot are links to blobs, which lie elsewhere and are just as much the source.
    files = [shard.path for shard in source.shards] + [source.root / name for name in source.side_files]
    real = {Path(os.path.realpath(path)).parent for path in files}
    # Beside a single file there may be a target; below a folder of the source there may be none.
    inside = not source.is_single_file and any(_identity(folder) in above for folder in {there, *real})
    holding = own is not None and any(own in map(_identity, (folder, *folder.parents)) for folder in {there, *real})
    if inside or holding:
        raise TargetError(f"lies inside the source {source.root}, or the other way round; name another folder", where=str(target))


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        info = folder.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _is_complete(plan: Plan, target: Path, workers: int) -> bool:
    """Whether this very run is finished here and all that it wrote stands as it was written; read to be sure."""
    record = read_record(target) if target.is_dir() and not has_unfinished_run(target) else None
    if record is None:
        return False
    if record.get("fingerprint") != plan.fingerprint:
        raise JournalError("holds the finished output of another run", where=str(target), remedy="; replace it with {overwrite}")
    damaged = damaged_files(target, record, workers)
    if damaged:
        raise TargetError(
            f"there is no stopped run to resume: the run here was finished, and since then {', '.join(damaged[:4])} "
            f"{'was' if len(damaged) == 1 else 'were'} changed or removed",
            where=str(target),
            remedy="; make it anew with {overwrite}, or name another folder",
        )
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


def _refuse_foreign(target: Path) -> None:
    """Overwriting replaces what a run wrote, and nobody's notes, nor another model."""
    foreign = foreign_files(target)
    if foreign:
        more = f" and {len(foreign) - 4} more" if len(foreign) > 4 else ""
        raise TargetError(
            f"holds files that no run of surgeon wrote, or that were changed since: {', '.join(foreign[:4])}{more}",
            where=str(target),
            remedy="; {overwrite} replaces nothing but what a run wrote, so move them away or name another folder",
        )


def check_room(plan: Plan, target: Path, freed_bytes: int = 0, spool_bytes: int = 0) -> None:
    """Raise TargetError if the disk has no room for the output, and for what lies beside it while the run lasts."""
    free = free_bytes(target) + freed_bytes
    needed = needed_bytes(plan) + _SPARE_BYTES
    if free < needed + spool_bytes:
        beside = f" and the shards that are fetched for it {spool_bytes / 1e9:.2f} GB" if spool_bytes else ""
        raise TargetError(
            f"the output needs {needed / 1e9:.2f} GB{beside} and the disk has {free / 1e9:.2f} GB free; "
            "make room or name another disk",
            where=str(target),
            remedy=", or give a smaller {ahead}" if free >= needed else "",
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
    """Remove what a run wrote; the folder of its state stays, for it holds the lock that keeps others out."""
    _refuse_foreign(target)
    remove_own_files(target)

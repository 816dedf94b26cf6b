"""What a run has finished, so that a killed one continues.

``TARGET/.surgeon/run.json`` names the run; ``journal.jsonl`` gets one line per finished unit, appended only after the
unit's bytes are durable, with a digest for each range of bytes that the unit wrote. On resume a unit counts as done
only if the bytes on disk still have those digests.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorsurgeon.checkpoint.folder import STATE_FOLDER
from tensorsurgeon.checkpoint.sink import sink_errors
from tensorsurgeon.checkpoint.small_files import parse_json, read_small
from tensorsurgeon.errors import JournalError, TargetError
from tensorsurgeon.machine.files import make_durable, make_folder_durable

_RUN = "run.json"
_LINES = "journal.jsonl"
_LOCK = "lock"
# It names files and stamps of a source of any number of shards, and no tensor.
_MAX_RUN_BYTES = 64 << 20
_START_OVER = "; start over with {overwrite}"


def state_folder(target: Path) -> Path:
    """Where a run keeps its journal until it is finished."""
    return target / STATE_FOLDER


class Journal:
    """The open journal of one run; holds the lock that keeps a second run out of the target."""

    def __init__(self, target: Path, lock_fd: int) -> None:
        self.folder = state_folder(target)
        self._lock_fd = lock_fd
        self._fd = os.open(self.folder / _LINES, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        make_folder_durable(self.folder)

    @classmethod
    def start(cls, target: Path, identity: dict[str, Any], clear: Callable[[], None] = lambda: None) -> Journal:
        """Begin a new run in ``target``; ``clear`` empties it, called when no other run can be writing there."""
        folder = state_folder(target)
        refuse_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        try:
            clear()
            # What an earlier run left: its lines would claim units of this one.
            (folder / _RUN).unlink(missing_ok=True)
            (folder / _LINES).unlink(missing_ok=True)
            partial = folder / (_RUN + ".partial")
            with open(partial, "w") as file:
                json.dump(identity, file, indent=2)
                file.flush()
                make_durable(file.fileno())
            os.replace(partial, folder / _RUN)
            return cls(target, lock)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def resume(cls, target: Path, identity: dict[str, Any]) -> tuple[Journal, dict[int, list[str]]]:
        """Continue the run in ``target``: the journal and the digests of each unit it says is done.

        Raises JournalError if the run was another one: its source, recipe, package version or shard size differ, or the
        source was written since, so that what is done may be made of other bytes.
        """
        folder = state_folder(target)
        refuse_link(folder)
        lock = _lock(folder)
        try:
            _refuse_other_run(target, identity)
            done = _read_lines(folder / _LINES)
            return cls(target, lock), done
        except BaseException:
            os.close(lock)
            raise

    def append(self, units: Iterable[tuple[int, list[str]]]) -> None:
        """Record units whose bytes are durable; durable itself when this returns."""
        text = "".join(json.dumps({"unit": unit, "digests": digests}) + "\n" for unit, digests in units).encode()
        with sink_errors(self.folder / _LINES, "be written"):
            while text:
                text = text[os.write(self._fd, text) :]
            make_durable(self._fd)

    def remove(self) -> None:
        """The run is finished and its record written: leave nothing behind.

        The name of the run goes first: from then on the folder is a finished checkpoint with traces, never a run
        whose journal is gone and which would be done again. The lock goes last, so that nobody takes a new one in a
        folder that is about to go.
        """
        with sink_errors(self.folder, "be removed"), suppress(FileNotFoundError):
            (self.folder / _RUN).unlink(missing_ok=True)
            for path in sorted(self.folder.iterdir(), key=lambda path: path.name == _LOCK):
                if path.is_dir() and not path.is_symlink():
                    # Shards of a source on the Hub, of a run that was started over.
                    shutil.rmtree(path)
                else:
                    path.unlink()
            self.folder.rmdir()
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            os.close(self._lock_fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def has_traces_of_run(target: Path) -> bool:
    """A run that died before it had a name, or while it removed its last traces: nothing of it is of use."""
    return state_folder(target).is_dir() and not has_unfinished_run(target)


def has_unfinished_run(target: Path) -> bool:
    """Whether a run was stopped in this folder."""
    return (state_folder(target) / _RUN).exists()


def refuse_link(folder: Path) -> None:
    """Raise TargetError if the folder of a run's state leads elsewhere."""
    if folder.is_symlink():
        raise TargetError("is a link, which is not written through; remove it", where=str(folder))


def _lock(folder: Path) -> int:
    fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise TargetError("another surgeon is writing here; wait for it or stop it", where=str(folder.parent)) from error
    try:
        is_current = os.fstat(fd).st_ino == os.stat(folder / _LOCK).st_ino
    except FileNotFoundError:
        is_current = False
    if not is_current:
        # The run that held the lock has just finished and taken its folder away.
        os.close(fd)
        raise TargetError("another surgeon has just finished here; look at what it wrote", where=str(folder.parent))
    return fd


def _refuse_other_run(target: Path, identity: dict[str, Any]) -> None:
    stopped = read_identity(target)
    hub, hub_now = stopped.get("hub"), identity.get("hub")
    if isinstance(hub, dict) and isinstance(hub_now, dict) and hub.get("repository") == hub_now["repository"] and hub != hub_now:
        raise JournalError(
            f"{hub_now['repository']} on the Hub has moved on since this run was stopped; name the commit that it reads: "
            f"{hub['repository']}@{hub.get('commit')}",
            where=str(target),
            remedy=_START_OVER.replace(";", ", or", 1),
        )
    if stopped.get("fingerprint") != identity["fingerprint"]:
        raise JournalError(
            "the run that was stopped here had another source, recipe, package version or shard size",
            where=str(target),
            remedy="; run exactly the command that was stopped, or start over with {overwrite}",
        )

    before, now = stopped.get("source"), identity["source"]
    changed = [name for name in now if not isinstance(before, dict) or before.get(name) != now[name]]
    if changed:
        raise JournalError(
            f"{changed[0]} of the source was written or replaced since this run was stopped, so what is done may be made of "
            "other bytes",
            where=str(target),
            remedy=_START_OVER,
        )


def read_identity(target: Path) -> dict[str, Any]:
    """What the run that was stopped in ``target`` said of itself; JournalError if that cannot be read."""
    folder = state_folder(target)
    try:
        identity = parse_json(read_small(folder / _RUN, _MAX_RUN_BYTES)[0])
    except (OSError, ValueError) as error:
        raise JournalError(f"{_RUN} cannot be read ({error})", where=str(folder), remedy=_START_OVER) from error
    if not isinstance(identity, dict):
        raise JournalError(f"{_RUN} is damaged", where=str(folder), remedy=_START_OVER)
    return identity


def _read_lines(path: Path) -> dict[int, list[str]]:
    done: dict[int, list[str]] = {}
    if not path.exists():
        return done
    lines = path.read_bytes().split(b"\n")
    # The last line has no newline after it if the machine died while it was written: it does not count.
    whole = lines[:-1]
    for line in whole:
        try:
            entry = json.loads(line)
            done[int(entry["unit"])] = [str(d) for d in entry["digests"]]
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            # Appends are whole or torn, so that damage elsewhere means that this unit is simply done again.
            continue
    if lines[-1]:
        with open(path, "r+b") as file:
            file.truncate(sum(len(line) + 1 for line in whole))
    return done

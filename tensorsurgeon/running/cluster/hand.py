"""What runs on a node: one process, whose threads do items of jobs.

A job is a value that travels once to each node and opens a desk there (files, a model); items are what threads do at
it, in any order. Nothing that a hand holds is the only one of its kind: a node that dies costs time.
"""

from __future__ import annotations

import platform
import re
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from tensorsurgeon.checkpoint.small_files import Stamp
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.machine.limits import available_bytes, raise_open_files_limit
from tensorsurgeon.version import __version__


class Desk(Protocol):
    """A job opened on a node."""

    def do(self, item: Any) -> Any:
        """The result of an item; any thread."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class Job(Protocol):
    """What items have in common; it pickles."""

    def open(self) -> Desk:
        """The desk, opened once per process."""
        ...


class Done(NamedTuple):
    """What came of an item."""

    value: Any


class Failed(NamedTuple):
    """An error that is nobody's fault but the input's, to be told as on one machine."""

    error: SurgeonError


PROCESSOR: Final = "processor"


class Sight(NamedTuple):
    """What a node says of itself and sees of the files: ``missing`` is the first that is not there as it should be."""

    versions: dict[str, str]
    free_bytes: int
    missing: str | None


def versions() -> dict[str, str]:
    """All that decides bytes and what can be unpickled, of this process."""
    found = {"tensorsurgeon": __version__, "Python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("numpy", "numba", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found | {PROCESSOR: processor()}


class Hand:
    """The actor; every method may be called by several threads."""

    def __init__(self) -> None:
        raise_open_files_limit()
        self._desks: dict[str, Desk] = {}
        self._opening = threading.Lock()

    def look(self, files: Sequence[tuple[str, Stamp]], token: str, reply: str) -> Sight:
        """Look whether ``files`` are here as they are elsewhere, and ``token``, which holds its own name; and write ``reply``."""
        missing = next((path for path, stamp in files if not _is_same(Path(path), stamp)), None)
        if missing is None:
            try:
                if Path(token).read_text() == Path(token).name:
                    Path(reply).write_text(Path(reply).name)
                else:
                    missing = token
            except OSError:
                missing = token
        return Sight(versions(), available_bytes(), missing)

    def do(self, session: str, job: Sequence[Any], item: Any) -> Done | Failed:
        """An item of the job of a ``session``; ``job`` holds a reference to it, fetched by whoever comes first."""
        try:
            return Done(self._desk(session, job).do(item))
        except SurgeonError as error:
            return Failed(error)

    def leave(self, session: str) -> None:
        """Let go of a job."""
        with self._opening:
            desk = self._desks.pop(session, None)
        if desk is not None:
            desk.close()

    def _desk(self, session: str, job: Sequence[Any]) -> Desk:
        import ray

        with self._opening:
            if session not in self._desks:
                opened: Job = ray.get(job[0])
                self._desks[session] = opened.open()
            return self._desks[session]


def processor() -> str:
    """The kind of this machine's processor: products of matrices have other bits on another."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _is_same(path: Path, stamp: Stamp) -> bool:
    """Whether a file has the size and time that another machine sees; its numbers of device and inode may be other ones."""
    try:
        found = Stamp.of(path.stat())
    except OSError:
        return False
    return (found.nbytes, found.modified_ns) == (stamp.nbytes, stamp.modified_ns)

"""A system that lacks what Linux on x86-64 has: everything works, and writes the same bytes."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from tensorsurgeon.machine import limits
from tensorsurgeon.running.run import default_max_ram_bytes
from tests.checkpoints import apply, folder_bytes
from tests.running.test_journal import STEPS

ABSENT = ("sched_getaffinity", "posix_fallocate", "fdatasync", "posix_fadvise", "copy_file_range", "sendfile")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS, as far as this package can see: no such calls, no /proc, a sync of its own."""
    for name in ABSENT:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(limits, "_PROC", tmp_path / "no_proc")
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path / "no_cgroups")
    known = {name: number for name, number in os.sysconf_names.items() if name != "SC_AVPHYS_PAGES"}
    monkeypatch.setattr(os, "sysconf_names", known)
    real = os.sysconf

    def sysconf(name: str) -> int:
        if name not in known:
            raise ValueError("unrecognized configuration name")
        return real(name)

    monkeypatch.setattr(os, "sysconf", sysconf)


@pytest.mark.usefixtures("elsewhere")
def test_a_whole_run_works_and_writes_the_same_bytes(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = fcntl.fcntl

    def full_sync(fd: int, command: int, *rest: int) -> int:
        if command == 51:
            synced.append(fd)
            return 0
        return real(fd, command, *rest)

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full_sync)
    apply(STEPS, moe, tmp_path / "there")
    assert synced
    monkeypatch.undo()
    apply(STEPS, moe, tmp_path / "here")
    assert folder_bytes(tmp_path / "there") == folder_bytes(tmp_path / "here")


@pytest.mark.usefixtures("elsewhere")
def test_a_network_share_without_a_full_sync_gets_the_usual_one(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 1 << 20, raising=False)  # refused with EINVAL
    apply([], moe, tmp_path / "out")
    assert (tmp_path / "out" / "surgeon.json").exists()


@pytest.mark.usefixtures("elsewhere")
def test_defaults_are_sane_where_nothing_says_what_is_free() -> None:
    assert limits.usable_cores() == os.cpu_count()
    assert 1 << 28 < default_max_ram_bytes() < 1 << 44


def test_defaults_are_sane_where_nothing_says_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "_PROC", tmp_path)
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert (limits.usable_cores(), limits.available_bytes()) == (1, 4 << 30)

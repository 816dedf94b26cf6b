"""Cores and memory as containers and other systems say them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tensorsurgeon.machine import limits

GB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /proc and /sys/fs/cgroup, on a machine with eight cores and 16 GB available."""
    monkeypatch.setattr(limits, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    put(tmp_path / "proc" / "meminfo", f"MemTotal: 99 kB\nMemAvailable:   {16 * GB // 1024} kB\n")
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_groups_it_is_what_the_machine_says(system: Path) -> None:
    assert (limits.usable_cores(), limits.available_bytes()) == (8, 16 * GB)


@pytest.mark.parametrize("root", ["cgroup", "cgroup/unified"])
def test_version_2_limits_of_every_group_above_count(root: str, system: Path) -> None:
    put(system / "proc/self/cgroup", "0::/pod/task\n")
    put(system / root / "pod/task/cpu.max", "max 100000\n")
    put(system / root / "pod/cpu.max", "250000 100000\n")
    put(system / root / "pod/memory.max", f"{4 * GB}\n")
    put(system / root / "pod/memory.current", f"{3 * GB}\n")
    put(system / root / "pod/memory.stat", f"anon {GB}\ninactive_file {GB}\nactive_file 4096\nslab 7\n")
    put(system / root / "pod/task/memory.max", "max\n")
    put(system / root / "pod/task/memory.current", f"{GB}\n")
    # Two and a half cores are three threads; caches leave when memory is needed.
    assert (limits.usable_cores(), limits.available_bytes()) == (3, 2 * GB + 4096)


def test_version_1_limits_where_the_container_sees_the_mounted_root_only(system: Path) -> None:
    put(system / "proc/self/cgroup", "9:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    put(system / "cgroup/cpu/cpu.cfs_quota_us", "150000\n")
    put(system / "cgroup/cpu/cpu.cfs_period_us", "100000\n")
    put(system / "cgroup/memory/memory.limit_in_bytes", f"{2 * GB}\n")
    put(system / "cgroup/memory/memory.usage_in_bytes", f"{GB}\n")
    put(system / "cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 1000\n")
    assert (limits.usable_cores(), limits.available_bytes()) == (2, GB + 1000)


def test_no_limit_in_version_1_is_no_limit(system: Path) -> None:
    put(system / "proc/self/cgroup", "9:cpu:/\n4:memory:/\n")
    put(system / "cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    put(system / "cgroup/cpu/cpu.cfs_period_us", "100000\n")
    put(system / "cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    put(system / "cgroup/memory/memory.usage_in_bytes", "4096\n")
    assert (limits.usable_cores(), limits.available_bytes()) == (8, 16 * GB)


def test_a_group_that_has_used_up_everything_leaves_nothing(system: Path) -> None:
    put(system / "proc/self/cgroup", "0::/a\n")
    put(system / "cgroup/a/memory.max", "1000\n")
    put(system / "cgroup/a/memory.current", "2000\n")
    assert limits.available_bytes() == 0


def test_nonsense_in_these_files_is_no_limit(system: Path) -> None:
    put(system / "proc/self/cgroup", "what\n0::/a\n::::\n")
    for name in ("cpu.max", "memory.max", "memory.current", "memory.stat"):
        put(system / "cgroup/a" / name, "\x00? 7")
    assert (limits.usable_cores(), limits.available_bytes()) == (8, 16 * GB)

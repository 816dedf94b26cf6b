"""How many cores and how much memory this process may use: what the machine has, and what its container allows.

Linux says it in /proc and, for control groups, below /sys/fs/cgroup (version 2: one tree; version 1: one per resource).
Other systems say less; what they do not say is not guessed at more than a default needs.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_CGROUPS: Final = Path("/sys/fs/cgroup")
_PROC: Final = Path("/proc")
# A process that cannot learn what is free assumes this much, which is what small machines have.
_UNKNOWN_BYTES: Final = 4 << 30
# More shards than any published checkpoint has, source and output together.
_MANY_FILES: Final = 1 << 16


def usable_cores() -> int:
    """Cores that this process may use, at least one: its affinity, and the share that a container gives it, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_core_limits()]))


def available_bytes() -> int:
    """Memory that this process may still take, file caches included: they leave when memory is needed."""
    return max(0, min([_machine_bytes(), *_memory_limits()]))


def open_files_limit() -> int:
    """How many files this process may have open at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else sys.maxsize


def raise_open_files_limit() -> None:
    """Allow as many open files as this process may allow itself; for a command, which is alone in its process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _machine_bytes() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(_PROC / "meminfo") or "", re.MULTILINE)
    if found:
        return int(found.group(1)) * 1024
    # macOS has no count of free pages here: half of all there is, since others run too.
    for name, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        try:
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") // share
        except (ValueError, OSError, AttributeError):
            continue
    return _UNKNOWN_BYTES


def _core_limits() -> Iterator[int]:
    for folder in _folders("", "cpu"):
        quota, _, period = (_text(folder / "cpu.max") or "").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us") or "", _text(folder / "cpu.cfs_period_us") or ""
        if quota.strip().isdigit() and period.strip().isdigit() and int(period):
            yield -(-int(quota) // int(period))


def _memory_limits() -> Iterator[int]:
    """What each control group above this process leaves it; version 1 says "no limit" by a number beyond all memory."""
    names = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
    for folder in _folders("", "memory"):
        for limit, usage, prefix in names:
            allowed, used = _text(folder / limit) or "", _text(folder / usage) or ""
            if allowed.strip().isdigit() and used.strip().isdigit():
                caches = re.findall(rf"^{prefix}(?:in)?active_file (\d+)", _text(folder / "memory.stat") or "", re.MULTILINE)
                yield int(allowed) - int(used) + sum(map(int, caches))


def _folders(*controllers: str) -> Iterator[Path]:
    """The folders of this process's control groups for these controllers ("" is version 2), each with those above it."""
    for line in (_text(_PROC / "self" / "cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for controller in controllers:
            if controller not in names.split(","):
                continue
            # Inside a container the path may be that of the host, of which only the mounted root is seen.
            for root in (_CGROUPS / controller, _CGROUPS / "unified") if not controller else (_CGROUPS / controller,):
                group = root / path.lstrip("/")
                yield from (at for at in (group, *group.parents) if at == root or root in at.parents)


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return None

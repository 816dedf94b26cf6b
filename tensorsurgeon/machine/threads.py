"""Work spread over threads, a bounded number of jobs at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Final, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

# A job that waits takes about a kilobyte, and half a million tensors are as many jobs.
_WAITING: Final = 4096


def in_threads(work: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """What ``work`` says of each job, in their order; ``Executor.map`` would queue all of them at once."""
    with ThreadPoolExecutor(workers) as pool:
        rest = iter(jobs)
        while waiting := list(islice(rest, _WAITING)):
            yield from pool.map(work, waiting)

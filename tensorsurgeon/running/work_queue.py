"""Which unit a worker takes next. Nothing here changes a byte, only how long a run takes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from tensorsurgeon.planning.plan import Plan


class WorkQueue:
    """Units in the order of the source, copies spread among those that compute; not safe without the caller's lock.

    Copies alone until ``may_compute`` says that the code to compute with is loaded: a worker that took another unit
    would wait for it, with the disk idle. From then on copies are spread evenly, for a copy holds its file's lock in
    the kernel most of the time, so that two at once wait for each other.
    """

    def __init__(self, plan: Plan, numbers: Sequence[int], may_compute: Callable[[], bool]) -> None:
        self._copies = deque(number for number in numbers if not plan.units[number].tasks)
        self._computing = deque(number for number in numbers if plan.units[number].tasks)
        self._may_compute = may_compute
        self._until_copy = 0
        self._next: int | None = None

    def peek(self) -> int | None:
        """The number of the unit that comes next, the same until it is taken; None if there is no more."""
        if self._next is None:
            self._next = self._choose()
        return self._next

    def take(self) -> None:
        """The unit that ``peek`` named is under way."""
        self._next = None

    def _choose(self) -> int | None:
        if not self._copies or not self._computing:
            queue = self._copies or self._computing
            return queue.popleft() if queue else None
        if self._until_copy and self._may_compute():
            self._until_copy -= 1
            return self._computing.popleft()
        number = self._copies.popleft()
        self._until_copy = len(self._computing) // (len(self._copies) + 1)
        return number


@contextmanager
def warming_up(plan: Plan, numbers: Sequence[int]) -> Iterator[Callable[[], bool]]:
    """Let the steps of these units load what they compute with beside the first copies; yields whether they have.

    What goes wrong there shows when the steps are applied.
    """
    steps_used = {task.step for number in numbers for task in plan.units[number].tasks}
    steps = [step for number in steps_used if (step := getattr(plan.steps[number], "warm_up", None)) is not None]
    threads = [threading.Thread(target=_quietly, args=(step,), name="surgeon-warm-up", daemon=True) for step in steps]
    for thread in threads:
        thread.start()
    try:
        yield lambda: not any(thread.is_alive() for thread in threads)
    finally:
        for thread in threads:
            thread.join()


def _quietly(step: Callable[[], None]) -> None:
    with suppress(Exception):
        step()

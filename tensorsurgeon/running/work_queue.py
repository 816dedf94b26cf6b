"""Which unit a worker takes next. Nothing here changes a byte, only how long a run takes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np

from tensorsurgeon.formats.coding import Written, stored_in, written_by
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.rewriting import Rewrite, Transform
from tensorsurgeon.tensors.dtypes import DType
from tensorsurgeon.tensors.spec import Region, TensorSpec


class WorkQueue:
    """Units in the order of the source, copies spread among those that compute; not safe without the caller's lock.

    Copies alone until ``may_compute`` says that the code to compute with is loaded: a worker that took another unit
    would wait for it, with the disk idle. From then on copies are spread evenly, for a copy holds its file's lock in
    the kernel most of the time, so that two at once wait for each other. ``in_order`` takes units as they are given: where
    the source comes shard by shard, a unit out of order would wait for its shard.
    """

    def __init__(self, plan: Plan, numbers: Sequence[int], may_compute: Callable[[], bool], *, in_order: bool = False) -> None:
        self._copies = deque(number for number in numbers if not in_order and not plan.units[number].tasks)
        self._computing = deque(number for number in numbers if in_order or plan.units[number].tasks)
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
    """Load what quantizing these units computes with beside the first copies; yields whether it is loaded.

    A small weight of each kind is quantized. What goes wrong there shows when the steps are applied.
    """
    kinds = {
        (task.step, task.rewrite.detail, task.rewrite.inputs[0].spec.dtype): written
        for number in numbers
        for task in plan.units[number].tasks
        if (written := written_by(task.rewrite.detail)) is not None
        and written.method == "rtn"
        and not written.scheme.clip_search  # the search runs in torch
        and stored_in(task.rewrite.detail) is None
    }
    work = [partial(_quantize_small, plan.steps[step], written, dtype) for (step, _, dtype), written in kinds.items()]
    threads = [threading.Thread(target=_quietly, args=(small,), name="surgeon-warm-up", daemon=True) for small in work]
    for thread in threads:
        thread.start()
    try:
        yield lambda: not any(thread.is_alive() for thread in threads)
    finally:
        for thread in threads:
            thread.join()


def _quantize_small(step: Transform, written: Written, dtype: DType) -> None:
    columns = 256 if written.scheme.group_size == -1 else written.scheme.group_size * 32
    weight = TensorSpec("weight", dtype, (64, columns))
    step.apply(Rewrite((Region(weight),), (), detail=written), [np.zeros(weight.shape, dtype.numpy)])


def _quietly(work: Callable[[], None]) -> None:
    with suppress(Exception):
        work()

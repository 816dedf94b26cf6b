"""Work in parallel without the order showing: one torch thread per worker, and turns where sums are taken."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager

import torch

from tensorsurgeon.errors import Interrupted
from tensorsurgeon.quant.threads import one_torch_thread, torch_pool


class Turns:
    """Lets item ``n`` at a place only after item ``n - 1`` has passed it, so that sums are taken in one order."""

    def __init__(self) -> None:
        self._next: dict[str, int] = defaultdict(int)
        self._moved = threading.Condition()
        self._failed = False

    @contextmanager
    def turn(self, place: str, item: int) -> Iterator[None]:
        """Wait for this item's turn at ``place``; Interrupted if another worker failed meanwhile."""
        with self._moved:
            while self._next[place] != item and not self._failed:
                self._moved.wait()
            if self._failed:
                raise Interrupted("another worker failed")
        yield
        with self._moved:
            self._next[place] = item + 1
            self._moved.notify_all()

    def fail(self) -> None:
        """Release everybody: a turn will never come."""
        with self._moved:
            self._failed = True
            self._moved.notify_all()


def run_parallel(
    count: int, work: Callable[[int], None], *, workers: int, stop: threading.Event, turns: Turns | None = None
) -> None:
    """``work(n)`` for every n below ``count``, taken in order by ``workers`` threads.

    Raises the first error in the order of items, or Interrupted once ``stop`` is set.
    """
    next_item = iter(range(count))
    lock = threading.Lock()
    failures: list[tuple[int, BaseException]] = []

    def loop() -> None:
        # Grad mode belongs to a thread.
        with torch.no_grad():
            while not stop.is_set() and not failures:
                with lock:
                    item = next(next_item, None)
                if item is None:
                    return
                try:
                    work(item)
                except BaseException as error:  # noqa: BLE001  # raised again below, once all workers have ended
                    failures.append((item, error))
                    if turns is not None:
                        turns.fail()

    with one_torch_thread(), torch_pool(max(1, workers)) as pool:
        try:
            wait([pool.submit(loop) for _ in range(max(1, min(workers, count)))])
        except BaseException:
            stop.set()
            raise
    real = [pair for pair in sorted(failures, key=lambda pair: pair[0]) if not isinstance(pair[1], Interrupted)]
    if real:
        raise real[0][1]
    if failures:
        raise failures[0][1]
    if stop.is_set():
        raise Interrupted("stopped during calibration; finished layers are kept")

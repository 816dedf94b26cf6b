"""How torch's work is spread over cores: a thread of ours per piece, none of torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch's own threads off: workers over batches use the cores better, and small products lose nothing to hand-overs.

    It also makes the bits those of one thread, whatever the machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def map_in_threads(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """``work`` of each item, in order, by ``workers`` threads with one torch thread each; with one, in this thread."""
    if workers <= 1:
        return [work(item) for item in items]

    def quietly(item: Item) -> Result:
        # Grad mode belongs to a thread.
        with torch.no_grad():
            return work(item)

    with one_torch_thread(), ThreadPoolExecutor(min(workers, max(1, len(items)))) as pool:
        return list(pool.map(quietly, items))

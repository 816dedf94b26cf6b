"""How torch's work is spread over cores: a thread of ours per piece, none of torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch's own threads off: workers over batches use the cores better, and small products lose nothing to hand-overs.

    It also makes the bits those of one thread, whatever the machine: products of 2,048 terms and more are split between
    threads, and sums of them then come out otherwise. Works as a decorator too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torch_pool(workers: int) -> ThreadPoolExecutor:
    """A pool whose threads each use one torch thread, from their very first product on.

    Torch hands its number of threads to a thread of ours only with that thread's first elementwise operation; a product
    before it would be split over the whole machine.
    """
    return ThreadPoolExecutor(workers, thread_name_prefix="calibrate", initializer=torch.set_num_threads, initargs=(1,))

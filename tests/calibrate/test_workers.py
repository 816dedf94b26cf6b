"""Workers share nothing that shows: the first product of a fresh thread has the bits of any other."""

from __future__ import annotations

import threading

import pytest
import torch

from tensorsurgeon.calibrate.walk.workers import run_parallel


@pytest.mark.parametrize("shape", [(128, 4096, 32), (128, 2048, 64), (512, 2048, 16)])
def test_the_first_operation_of_a_worker_may_be_a_product(shape: tuple[int, int, int]) -> None:
    rows, terms, columns = shape
    seeded = torch.Generator().manual_seed(3)
    pairs = [
        (torch.randn(rows, terms, generator=seeded), torch.randn(terms, columns, generator=seeded)) for _ in range(6)
    ]  # fmt: skip
    before = torch.get_num_threads()
    results = []
    try:
        for threads, workers in ((1, 1), (4, 1), (4, 2), (4, 3)):
            torch.set_num_threads(threads)
            made: dict[int, torch.Tensor] = {}

            def multiply(item: int, made: dict[int, torch.Tensor] = made) -> None:
                made[item] = pairs[item][0] @ pairs[item][1]

            run_parallel(len(pairs), multiply, workers=workers, stop=threading.Event())
            results.append([made[item] for item in range(len(pairs))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))

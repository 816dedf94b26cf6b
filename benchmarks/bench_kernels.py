"""Quantization kernels in GB/s of weight read, beside memcpy in the same run.

    python benchmarks/bench_kernels.py [--threads 1 2] [--rows 512] [--columns 2048] [--seconds 0.5] [--torch]

Each thread works on its own matrix with its own workspace, as the executor's workers do; a figure is the best of many
calls, because other processes can only make one slower. Start-up is a process of its own, which compiles the
loops it needs or finds them kept.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import ml_dtypes
import numpy as np

from tensorsurgeon.quant import bitpack
from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.arrays import workspace_of_thread
from tensorsurgeon.tensors.dtypes import BF16

Work = Callable[[np.ndarray], object]

STARTUP = """
import time
start = time.perf_counter()
import numpy, ml_dtypes
numpy_s = time.perf_counter() - start
from tensorsurgeon.tensors.dtypes import BF16
from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.quant.scheme import Scheme
weight = numpy.ones((512, 2048), ml_dtypes.bfloat16)
choose_backend("auto", Scheme(), BF16).quantize(weight, Scheme())
print(f"{numpy_s:.3f} s numpy and ml_dtypes, {time.perf_counter() - start - numpy_s:.3f} s our modules and the first call")
"""


def works(with_torch: bool) -> dict[str, Work]:
    """What is measured, by name."""

    def quantize(scheme: Scheme, backend: str = "fast") -> Work:
        chosen = choose_backend(backend, scheme, BF16)
        return lambda weight: chosen.quantize(weight, scheme)

    def packed(scheme: Scheme, pack: Callable[[np.ndarray], np.ndarray], backend: str = "fast") -> Work:
        chosen = choose_backend(backend, scheme, BF16)
        return lambda weight: pack(chosen.quantize(weight, scheme).codes)

    int4, g32 = Scheme(num_bits=4, group_size=128), Scheme(num_bits=4, group_size=32)
    gptq = Scheme(num_bits=4, group_size=128, rule="gptq")
    awq = Scheme(num_bits=4, group_size=128, rule="awq", symmetric=False)
    found = {
        "int8 channel, compressed-tensors (BF16 division)": quantize(Scheme()),
        "int8 channel, quark (F32 reciprocal)": quantize(Scheme(rule="quark")),
        "int4 g128, compressed-tensors": quantize(int4),
        "int4 g128, compressed-tensors, packed along rows": packed(int4, lambda c: bitpack.pack_rows(c, 4, offset=8)),
        "int4 g32, compressed-tensors, packed along rows": packed(g32, lambda c: bitpack.pack_rows(c, 4, offset=8)),
        "int4 g128, gptq (F32 division), packed along columns": packed(gptq, lambda c: bitpack.pack_columns(c, 4, offset=8)),
        "int4 g128 asymmetric, awq, packed transposed": packed(
            awq, lambda c: bitpack.pack_transposed(c, 4, offset=8, order=bitpack.AWQ_ORDER)
        ),
        "fp8 channel": quantize(Scheme(type="fp8")),
        "fp8 128 x 128": quantize(Scheme(type="fp8", block=(128, 128))),
        "nvfp4": quantize(Scheme(type="nvfp4", num_bits=4, group_size=16)),
        "mxfp4": quantize(Scheme(type="mxfp4", num_bits=4, group_size=32)),
    }
    if with_torch:
        found["int8 channel, compressed-tensors, torch"] = quantize(Scheme(), "torch")
        found["int4 g128, compressed-tensors, torch, packed along rows"] = packed(
            int4, lambda c: bitpack.pack_rows(c, 4, offset=8), "torch"
        )
    return found


def gigabytes_per_second(work: Work, weights: list[np.ndarray], seconds: float) -> float:
    """Bytes of weight read per second by one thread per matrix, all running at once; the best round."""
    rounds = 2  # short, so that some rounds run undisturbed on a busy machine
    barrier = Barrier(len(weights))

    def worker(weight: np.ndarray) -> list[float]:
        with workspace_of_thread() as workspace:
            work(weight)  # compiles, or loads what is compiled
            spent = []
            stop = time.perf_counter() + seconds
            while True:
                barrier.wait()
                start = time.perf_counter()
                for _ in range(rounds):
                    workspace.reset()
                    work(weight)
                spent.append(time.perf_counter() - start)
                finished = time.perf_counter() > stop
                # every thread must decide alike, or one waits for ever: the slowest decides
                done[barrier.wait()] = finished
                barrier.wait()
                if any(done[: len(weights)]):
                    return spent

    done = [False] * len(weights)
    with ThreadPoolExecutor(len(weights)) as pool:
        spent = list(pool.map(worker, weights))
    slowest = [max(times) for times in zip(*spent, strict=True)]
    return rounds * sum(w.nbytes for w in weights) / min(slowest) / 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--torch", action="store_true", help="the torch backend as well, one torch thread per call")
    arguments = parser.parse_args()
    if arguments.torch:
        import torch

        torch.set_num_threads(1)
    shape = (arguments.rows, arguments.columns)
    weights = [
        (np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
        for seed in range(max(arguments.threads))
    ]
    targets = {id(weight): np.empty_like(weight) for weight in weights}
    table: dict[str, Work] = {"memcpy into warm memory": lambda w: np.copyto(targets[id(w)], w)}
    table.update(works(arguments.torch))
    print(f"GB/s of BF16 {list(shape)} per thread, {platform.processor() or platform.machine()}, NumPy {np.__version__}")
    print("".join(f"{f'{count} thread' + 's' * (count > 1):>12}" for count in arguments.threads))
    for name, work in table.items():
        figures = (gigabytes_per_second(work, weights[:count], arguments.seconds) for count in arguments.threads)
        print("".join(f"{figure:12.1f}" for figure in figures), f" {name}", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for what in ("loops compiled", "loops kept"):
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
            done = subprocess.run([sys.executable, "-c", STARTUP], env=environment, capture_output=True, text=True, check=True)
            print(f"start-up, {what}: {done.stdout.strip()}")


if __name__ == "__main__":
    main()

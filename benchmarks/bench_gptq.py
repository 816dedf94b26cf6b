"""GPTQ's time and error beside llm-compressor's `quantize_weight`, in turn on the same input, medians.

    python benchmarks/bench_gptq.py --llmcompressor .venvs/llmcompressor/bin/python [--threads 2] [--runs 7]
    python benchmarks/bench_gptq.py --few-tokens 128 256 512 1024 2048 4096   # errors only, over more seeds

Input: 4,096 correlated tokens with 8 loud channels, weights with 4 loud columns, int4 in groups of 128, damping 0.01,
static activation order, scales in F16, Hessians given. Errors are tr(D H D^T) / tr(W H W^T) in F64 on the calibration
tokens and on 8,192 fresh ones. llm-compressor runs in its own interpreter, which makes the same input from the same
seeds; only the calls are timed. Both sides get the base scale amax / 7.5.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROUP_SIZE = 128
SHAPES = ((1024, 2048), (2048, 512))
EXPERTS = 8


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(in_features: int, tokens: int, seed: int) -> Tensor:
    """Correlated tokens with a falling spectrum and 8 channels ten times louder, F32 [tokens, in]."""
    noise = torch.randn(tokens, in_features, generator=_seeded(seed))
    mixing = torch.randn(in_features, in_features, generator=_seeded(1001)) / in_features**0.5
    spectrum = (1 + torch.arange(in_features, dtype=torch.float32)) ** -0.5
    spectrum /= spectrum.square().mean().sqrt()
    tokens_of_layer = noise @ (spectrum[:, None] * mixing)
    tokens_of_layer[:, torch.randperm(in_features, generator=_seeded(1002))[:8]] *= 10
    return tokens_of_layer


def weight(out_features: int, in_features: int, seed: int) -> Tensor:
    """BF16 values with 4 columns eight times larger, F32 [out, in]."""
    generator = _seeded(seed)
    matrix = torch.randn(out_features, in_features, generator=generator) * 0.02
    matrix[:, torch.randperm(in_features, generator=generator)[:4]] *= 8
    return matrix.bfloat16().float()


def base_scale(matrix: Tensor) -> Tensor:
    return (matrix.unflatten(-1, (-1, GROUP_SIZE)).abs().amax(-1) / 7.5).half().float()


def relative_error(matrix: Tensor, dequantized: Tensor, hessian: Tensor) -> float:
    off, exact, original = (matrix - dequantized).double(), hessian.double(), matrix.double()
    return float(((off @ exact) * off).sum() / ((original @ exact) * original).sum())


def serve_llmcompressor() -> None:
    """The other interpreter: one JSON line in (what to do), one out (seconds)."""
    # Before the imports: llm-compressor logs to stdout.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    scheme = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP_SIZE, actorder="static")
    case: tuple[Tensor, Tensor, Tensor] | None = None
    dequantized = torch.empty(0)
    for line in sys.stdin:
        order = json.loads(line)
        seconds = 0.0
        if order["do"] == "load":
            torch.set_num_threads(order["threads"])
            tokens = inputs(order["in"], 4096, 1000)
            matrix = weight(order["out"], order["in"], order["seed"])
            case = (matrix, tokens.T @ tokens, base_scale(matrix))
        elif order["do"] == "run":
            assert case is not None
            matrix, hessian, scale = (tensor.clone()[None] for tensor in case)
            started = time.perf_counter()
            dequantized, _, _ = quantize_weight(matrix, hessian, scale, torch.zeros_like(scale), None, scheme)
            seconds = time.perf_counter() - started
        else:
            torch.save(dequantized[0], order["path"])
        replies.write(json.dumps({"seconds": seconds}) + "\n")
        replies.flush()


class Peer:
    """llm-compressor in its own interpreter."""

    def __init__(self, interpreter: str) -> None:
        self._process = subprocess.Popen(
            [interpreter, __file__, "--serve-llmcompressor"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **order: Any) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise SystemExit(f"llm-compressor's interpreter stopped with {self._process.wait()}")
        return float(json.loads(reply)["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _sharing(stack: Tensor, hessian: Tensor, scale: Tensor, options: Any, grid: dict[str, Any], threads: int) -> Tensor:
    """Matrices with one Hessian as calibration takes them: one factor, rows side by side, a thread per stack of rows."""
    from tensorsurgeon.quant.gptq.gptq import STACK_ROWS, gptq
    from tensorsurgeon.quant.gptq.hessian import damp_for_tokens, flipped_cholesky
    from tensorsurgeon.quant.threads import one_torch_thread, torch_pool

    factor = flipped_cholesky(hessian, damp_for_tokens(options.damp_percent, grid["tokens"], stack.shape[2]), options.act_order)
    together = max(1, STACK_ROWS // stack.shape[1])

    def quantize(first: int) -> Tensor:
        part = slice(first, first + together)
        weight, base = stack[part].flatten(0, 1), scale[part].flatten(0, 1)
        return gptq(weight, hessian, scale=base, options=options, factor=factor, **grid).dequantize()

    with one_torch_thread(), torch_pool(threads) as pool:
        pieces = list(pool.map(quantize, range(0, len(stack), together)))
    return pieces[0][: stack.shape[1]]


def compare(peer: Peer | None, shape: tuple[int, int], seed: int, threads: int, runs: int) -> None:
    """Print one table: every variant of ours, and llm-compressor between them in each round."""
    from tensorsurgeon.quant.gptq.gptq import GptqOptions, gptq
    from tensorsurgeon.quant.gptq.polish import Polish

    torch.set_num_threads(threads)
    tokens = inputs(shape[1], 4096, 1000)
    hessian = tokens.T @ tokens
    fresh_tokens = inputs(shape[1], 8192, 777)
    fresh = fresh_tokens.T @ fresh_tokens
    matrix = weight(*shape, seed)
    scale = base_scale(matrix)
    stack = torch.stack([weight(*shape, seed + 100 * expert) for expert in range(EXPERTS)])
    stack_scale = base_scale(stack)
    grid: dict[str, Any] = {
        "qmin": -8, "qmax": 7, "group_size": GROUP_SIZE, "store_scale": lambda scales: scales.half().float(), "tokens": 4096,
    }  # fmt: skip
    plain = GptqOptions(search=None, measure_energy=False)
    searched = GptqOptions(measure_energy=False)
    polished = GptqOptions(measure_energy=False, polish=Polish())
    variants: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: gptq(matrix, hessian, scale=scale, options=plain, **grid).dequantize(),
        "ours, searched scales": lambda: gptq(matrix, hessian, scale=scale, options=searched, **grid).dequantize(),
        "ours, searched and polished": lambda: gptq(matrix, hessian, scale=scale, options=polished, **grid).dequantize(),
        f"ours, {EXPERTS} sharing H, each": lambda: _sharing(stack, hessian, stack_scale, plain, grid, threads),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in ("llm-compressor", *variants)}
    results: dict[str, Tensor] = {}
    if peer is not None:
        peer.ask(do="load", out=shape[0], **{"in": shape[1]}, seed=seed, threads=threads)
    for repeat in range(runs + 1):  # the first compiles and warms up, and is not counted
        for name, run in variants.items():
            if peer is not None:
                seconds = peer.ask(do="run")
                if repeat:
                    times["llm-compressor"].append(seconds)
            started = time.perf_counter()
            results[name] = run()
            seconds = (time.perf_counter() - started) / (EXPERTS if "sharing" in name else 1)
            if repeat:
                times[name].append(seconds)
    if peer is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dequantized.pt"
            peer.ask(do="save", path=str(path))
            results["llm-compressor"] = torch.load(path)
    yardstick = statistics.median(times["llm-compressor"]) if peer is not None else None
    print(f"\n{shape[0]} x {shape[1]}, seed {seed}, {threads} threads, {runs} rounds, load {os.getloadavg()[0]:.1f}")
    print(f"{'':32}{'median s':>10}{'least s':>10}{'of theirs':>10}{'error':>10}{'fresh':>10}")
    for name, seconds_of_runs in times.items():
        if not seconds_of_runs:
            continue
        median = statistics.median(seconds_of_runs)
        share = f"{median / yardstick:.2f}" if yardstick else "-"
        errors = [relative_error(matrix, results[name], h) for h in (hessian, fresh)]
        print(f"{name:32}{median:10.4f}{min(seconds_of_runs):10.4f}{share:>10}{errors[0]:10.5f}{errors[1]:10.5f}")


def compare_few_tokens(shape: tuple[int, int], counts: list[int], seeds: list[int]) -> None:
    """Print errors on fresh tokens by how many tokens there were to calibrate on, means over seeds of weight and tokens."""
    from tensorsurgeon.quant.gptq.gptq import GptqOptions, gptq
    from tensorsurgeon.quant.gptq.polish import Polish
    from tensorsurgeon.quant.gptq.scale_search import round_to_nearest

    variants = {
        "plain": GptqOptions(search=None, measure_energy=False), "searched": GptqOptions(measure_energy=False),
        "polished": GptqOptions(measure_energy=False, polish=Polish()),
    }  # fmt: skip
    fresh_tokens = inputs(shape[1], 8192, 777)
    fresh = fresh_tokens.T @ fresh_tokens
    print(f"\n{shape[0]} x {shape[1]}, error on fresh tokens, mean over seeds {seeds} (worst of polished over rounded)")
    print(f"{'tokens':>8}{'rounded':>10}" + "".join(f"{name:>10}" for name in variants) + f"{'worst':>10}")
    for count in counts:
        found: dict[str, list[float]] = {name: [] for name in ("rounded", *variants)}
        for seed in seeds:
            tokens = inputs(shape[1], count, 1000 + 17 * seed)
            matrix = weight(*shape, seed)
            scale = base_scale(matrix)
            nearest = round_to_nearest(matrix, scale, None, qmin=-8, qmax=7) * scale.repeat_interleave(GROUP_SIZE, 1)
            found["rounded"].append(relative_error(matrix, nearest, fresh))
            for name, options in variants.items():
                made = gptq(
                    matrix, tokens.T @ tokens, scale=scale, options=options, qmin=-8, qmax=7, group_size=GROUP_SIZE,
                    store_scale=lambda scales: scales.half().float(), tokens=count,
                )  # fmt: skip
                found[name].append(relative_error(matrix, made.dequantize(), fresh))
        worst = max(one / other for one, other in zip(found["polished"], found["rounded"], strict=True))
        print(f"{count:8}" + "".join(f"{statistics.mean(errors):10.5f}" for errors in found.values()) + f"{worst:10.3f}")


def main() -> None:
    """Compare on both shapes with both weight seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="an interpreter that has llm-compressor")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 0])
    parser.add_argument("--few-tokens", type=int, nargs="+", metavar="COUNT", help="errors by tokens instead, no peer")
    parser.add_argument("--serve-llmcompressor", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve_llmcompressor:
        serve_llmcompressor()
        return
    if chosen.few_tokens:
        torch.set_num_threads(chosen.threads[0])
        for shape in SHAPES:
            compare_few_tokens(shape, chosen.few_tokens, chosen.seeds)
        return
    peer = Peer(chosen.llmcompressor) if chosen.llmcompressor else None
    for threads in chosen.threads:
        for shape in SHAPES:
            for seed in chosen.seeds:
                compare(peer, shape, seed, threads, chosen.runs)
    if peer is not None:
        peer.close()


if __name__ == "__main__":
    main()

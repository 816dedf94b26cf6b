"""Memory and time of an evaluation on the real model's shapes, with 2 and 4 layers: memory does not grow with them.

    python benchmarks/bench_evaluate.py [--layers 2,4] [--experts 256] [--tokens 4096] [--transform ct-w8a8-int8] [--work FOLDER]

Makes a random model of each number of layers (hidden 2048, 1.7 GB a layer with 256 experts), quantizes it, and evaluates it
against the original in a process of its own. Prints that process's peak resident memory, seconds per 1,000 tokens and layer
of one model, seconds per 1,000 tokens of logits, and what 40 layers would take. ``--check`` ends with 1 where the peak is
over 6 GB, or grows with layers by more than a tenth of one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.make_bench_model import write_bench_model
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.planning.rewriting import steps_of
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan

_LIMIT_BYTES = 6_000_000_000
_REAL_LAYERS = 40
_LENGTH = 512


def measured(source: Path, target: Path, tokens: Path, workers: int) -> dict[str, Any]:
    """One evaluation in this process: seconds of the layers and of the logits."""
    from tensorsurgeon.evaluating.options import TextOptions
    from tensorsurgeon.evaluating.run import evaluate
    from tensorsurgeon.evaluating.step import Step

    at: dict[str, list[float]] = {"layers": [], "logits": []}

    def progress(step: Step) -> None:
        at["logits" if step.what == "logits" else "layers"].append(time.monotonic())

    found = evaluate([target], TextOptions(locations=(str(tokens),)), against=source, workers=workers, progress=progress)
    logits = at["logits"][0]
    return {"walk": logits - at["layers"][0], "logits": time.monotonic() - logits, "kl": found.targets[0]["kl"]}


def peak_of(command: list[str]) -> tuple[dict[str, Any], int]:
    """What a command prints as JSON, and the largest memory that it held."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(text), usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,4")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--transform", default="ct-w8a8-int8")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where models lie meanwhile; the system's temporary folder by default")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--one", nargs=3, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(*given.one, given.workers)))
        return
    peaks = []
    print("| layers | peak memory | s per 1,000 tokens and layer | s per 1,000 tokens, logits | 40 layers, both models |")
    print("|---|---|---|---|---|", flush=True)
    for layers in map(int, given.layers.split(",")):
        work = Path(tempfile.mkdtemp(prefix="bench-evaluate-", dir=given.work))
        try:
            write_bench_model(work / "source", layers=layers, experts=given.experts)
            plan = make_plan(steps_of(load_transform(given.transform, {})), open_checkpoint(work / "source"))
            run_plan(plan, work / "target", workers=given.workers)
            tokens = work / "tokens.npy"
            np.save(tokens, np.random.default_rng(0).integers(0, 50_000, (given.tokens // _LENGTH, _LENGTH)))
            command = [sys.executable, __file__, "--workers", str(given.workers), "--one"]
            found, peak = peak_of([*command, str(work / "source"), str(work / "target"), str(tokens)])
        finally:
            shutil.rmtree(work)
        per_layer = found["walk"] / (2 * layers) / (given.tokens / 1000)
        per_logits = found["logits"] / (given.tokens / 1000)
        whole = 2 * _REAL_LAYERS * found["walk"] / (2 * layers) + found["logits"]
        peaks.append(peak)
        print(f"| {layers} | {peak / 1e9:.2f} GB | {per_layer:.2f} | {per_logits:.2f} | {whole / 60:.1f} min |", flush=True)
    if given.check and (max(peaks) > _LIMIT_BYTES or max(peaks) > peaks[0] + 170e6):
        raise SystemExit("memory grows with layers, or is over 6 GB")


if __name__ == "__main__":
    main()

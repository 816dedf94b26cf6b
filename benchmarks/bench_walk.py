"""Memory and time of a calibrated run on the real model's shapes: 256 experts, hidden 2048, several layers.

    python benchmarks/bench_walk.py [--layers 2,3] [--tokens 16384] [--workers 2] [--work FOLDER]

Makes a random model of each number of layers (about 1.7 GB a layer), calibrates it to int4 in groups of 128 in a process
of its own, and prints that process's peak resident memory, the seconds of each layer, and what 40 layers would take.
Time grows with tokens in two of three parts (the walk and the sums), so the estimate is for the tokens given.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

_LENGTH = 2048
_REAL_LAYERS = 40
_LIMIT_BYTES = 8_000_000_000


class _LayerTimes(logging.Handler):
    """Seconds of each layer, from the log lines of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("layer %d of 0 to %d") and isinstance(record.args, tuple):
            self.seconds.append(float(str(record.args[-1])))


def calibrate(source: Path, target: Path, tokens: Path, samples: int, workers: int, experts: str, polish: bool) -> dict[str, Any]:
    """One run in this process, and what it took."""
    from dataclasses import replace

    from tensorsurgeon.calibrate.log import LOG_NAME, read_log
    from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource
    from tensorsurgeon.calibrate.run import run_calibrated
    from tensorsurgeon.checkpoint.folder import open_checkpoint
    from tensorsurgeon.ops.quantize import Quantize
    from tensorsurgeon.planning.plan import make_plan
    from tensorsurgeon.planning.rewriting import steps_of
    from tensorsurgeon.quant.gptq.gptq import GptqOptions
    from tensorsurgeon.quant.gptq.polish import Polish
    from tensorsurgeon.recipes.library import load_transform

    times = _LayerTimes()
    logger = logging.getLogger("tensorsurgeon.calibrate.run")
    logger.addHandler(times)
    logger.setLevel(logging.INFO)
    steps = steps_of(load_transform("quantize-linears", {"format": "ct-packed", "num_bits": 4, "group_size": 128}))
    plan = make_plan([replace(s, method="gptq") if isinstance(s, Quantize) else s for s in steps], open_checkpoint(source))
    options = CalibrationOptions(
        sources=(DataSource(str(tokens)),), samples=samples, sequence_length=_LENGTH, experts=experts,  # type: ignore[arg-type]
        gptq=GptqOptions(polish=Polish() if polish else None),
    )  # fmt: skip
    began = time.monotonic()
    result = run_calibrated(plan, target, options, workers=workers)
    rows = read_log(target / LOG_NAME)
    return {
        "seconds": time.monotonic() - began, "layer_seconds": times.seconds, "methods": result.summary["methods"],
        "codes_worker_seconds": sum(row.seconds for row in rows), "rtn_reasons": result.summary["rtn_reasons"],
        "cpu_seconds": time.process_time(), "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,3", help="models of how many layers")
    parser.add_argument("--tokens", type=int, default=8 * _LENGTH)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--experts", default="balanced")
    parser.add_argument("--no-polish", action="store_true")
    parser.add_argument("--work", type=Path, help="where models and outputs go for a while (tens of GB)")
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    samples = max(1, given.tokens // _LENGTH)
    if given.run:
        source, target = given.run
        tokens = source.parent / "tokens.npy"
        print(json.dumps(calibrate(source, target, tokens, samples, given.workers, given.experts, not given.no_polish)))
        return
    here = str(Path(__file__).parent)
    sys.path.insert(0, here)
    from make_bench_model import write_bench_model

    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        work = Path(folder)
        np.save(work / "tokens.npy", np.random.default_rng(0).integers(0, 50_000, (samples, _LENGTH)))
        peaks = []
        for layers in map(int, given.layers.split(",")):
            total = write_bench_model(work / "model", layers=layers, experts=256, shards=4)
            passed_on = ["--tokens", str(given.tokens), "--workers", str(given.workers), "--experts", given.experts]
            command = [sys.executable, __file__, "--run", str(work / "model"), str(work / "out"), *passed_on]
            command += ["--no-polish"] if given.no_polish else []
            environment = {**os.environ, "PYTHONPATH": str(Path(here).parent)}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            peaks.append(found["peak_bytes"])
            each = sum(found["layer_seconds"]) / layers
            cpu = found["cpu_seconds"] / layers
            print(
                f"{layers} layers ({total / 1e9:.1f} GB), {samples * _LENGTH} tokens, {given.workers} workers: peak resident "
                f"{found['peak_bytes'] / 1e9:.2f} GB; {found['seconds']:.0f} s, per layer "
                f"{', '.join(f'{s:.0f}' for s in found['layer_seconds'])} s; of these choosing codes "
                f"{found['codes_worker_seconds'] / layers / given.workers:.0f} s a layer; {cpu:.0f} CPU s "
                f"a layer; {found['methods']}; "
                f"{_REAL_LAYERS} layers: {each * _REAL_LAYERS / 3600:.2f} h, or "
                f"{cpu * _REAL_LAYERS / given.workers / 3600:.2f} h with the cores to itself",
                flush=True,
            )
            shutil.rmtree(work / "model")
            shutil.rmtree(work / "out")
    if max(peaks) > _LIMIT_BYTES:
        raise SystemExit(f"peak resident memory {max(peaks) / 1e9:.2f} GB is over {_LIMIT_BYTES / 1e9:.0f} GB")
    # An allocator keeps some of what it was given; a layer of weights would be 1.7 GB.
    if len(peaks) > 1 and peaks[-1] > peaks[0] + 600_000_000:
        raise SystemExit(f"peak resident memory grows with layers: {', '.join(f'{p / 1e9:.2f}' for p in peaks)} GB")


if __name__ == "__main__":
    main()

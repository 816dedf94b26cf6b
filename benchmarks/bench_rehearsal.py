"""What ``surgeon plan --calibration`` says a calibration takes, beside what the run then takes, in CPU seconds.

    python benchmarks/bench_rehearsal.py [--layers 2] [--experts 32] [--samples 8] [--workers 2]

The fixture of the tests with 64 sequences of 512, and a model of the real one's shapes (``make_bench_model.py``) with
``--samples`` sequences of 2,048. CPU seconds are of the whole process, so that other work on the machine changes little; of the
run those of the same conversion without calibration are taken off, for the dry run does not speak of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from make_bench_model import write_bench_model

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "fixtures" / "tiny-qwen3_5-moe"
TRANSFORM = "gptq-int4-g128"


def surgeon(*arguments: object) -> tuple[dict[str, Any], float]:
    """What a command prints, and the CPU seconds that it took."""

    def used() -> float:
        taken = resource.getrusage(resource.RUSAGE_CHILDREN)
        return taken.ru_utime + taken.ru_stime

    before = used()
    command = [sys.executable, "-m", "tensorsurgeon", *map(str, arguments), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return json.loads(done.stdout), used() - before


def compare(name: str, source: Path, work: Path, calibration: list[object], workers: int) -> None:
    options = [*calibration, "--workers", workers]
    said, probing = surgeon("plan", TRANSFORM, source, *options)
    seconds = said["calibration"]["seconds"]
    _, rounding = surgeon("apply", TRANSFORM, source, work / f"{name}-rtn", "-q", "--workers", workers)
    _, taken = surgeon("apply", TRANSFORM, source, work / f"{name}-gptq", "-q", *options)
    wanted, found = seconds["all"] * workers, taken - rounding
    print(f"{name}: {said['calibration']['tokens']} tokens, {said['calibration']['layers']} layers")
    print(f"  said   {wanted:.1f} CPU s; seconds a layer of {workers} workers: {json.dumps(seconds['per_layer'])}")
    print(f"  taken  {found:.1f} CPU s, {found / wanted:.2f} of what was said; the dry run itself {probing:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = ["--calibration", ROOT / "fixtures" / "text" / "calibration.txt", "--samples", 64, "--sequence-length", 512]
        compare("fixture", FIXTURE, work, text, given.workers)
        write_bench_model(work / "model", layers=given.layers, experts=given.experts, shards=2)
        ids = np.random.default_rng(0).integers(0, 50_000, (given.samples, 2048))
        (work / "ids.json").write_text(json.dumps(ids.tolist()))
        ids_given = ["--calibration", work / "ids.json", "--samples", given.samples, "--sequence-length", 2048]
        compare("real shapes", work / "model", work, ids_given, given.workers)


if __name__ == "__main__":
    main()

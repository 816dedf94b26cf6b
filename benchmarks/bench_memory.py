"""Peak memory of every op and format against the cap.

    python benchmarks/bench_memory.py [--rows 8192] [--columns 4096] [--workers 2] [--only NAME] [--check]

Each line is a run of its own under the smallest cap that the plan takes, on a source whose largest weight is rows x columns,
with many of them. ``own`` is what the same command takes on a source of kilobytes: interpreter, NumPy, compiled loops.
``over`` is peak minus own minus cap; ``--check`` ends with 1 where it is more than ``CONSTANT_BYTES``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.formats.registry import FORMATS
from tensorsurgeon.ops.cast import Cast
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.ops.repack import Repack
from tensorsurgeon.ops.split import Split
from tensorsurgeon.ops.transpose import Transpose
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.running.run import run_plan
from tests.checkpoints import write_checkpoint

# What a run holds beside its interpreter and the arrays of its units: buffers for copies, journal and digests, and what the
# allocator keeps of scratch that was given back.
CONSTANT_BYTES: Final = 64 << 20
WEIGHTS: Final = 4
WHERE: Final = ("{p*}.mlp.{n}.weight",)
REPACKS: Final = (("ct-int", "quark-int8"), ("gptq", "ct-packed"), ("ct-packed", "awq"), ("awq", "gptq-v2"))


class Measured(NamedTuple):
    """Bytes of one run: the cap it had, its peak, and what the same code takes on nothing."""

    name: str
    cap: int
    peak: int
    own: int

    @property
    def over(self) -> int:
        return self.peak - self.own - self.cap


def ops() -> Iterator[tuple[str, Any, str | None]]:
    """Every op that computes: its name, itself, and the format that its source is quantized in."""
    yield "transpose", Transpose(where=WHERE), None
    yield "split columns", Split(where=WHERE, into=("{p}.{n}.a", "{p}.{n}.b"), axis=1), None
    yield "cast F16", Cast(where=WHERE, dtype="F16"), None
    for name in FORMATS:
        yield f"quantize {name}", Quantize(where=WHERE, format=name), None
        yield f"dequantize {name}", Dequantize(), name
    for name, to in REPACKS:
        yield f"repack {name} {to}", Repack(to=to, inexact_scales="round"), name


def source_of(folder: Path, rows: int, columns: int, layout: str | None) -> Path:
    """A checkpoint with a few weights [rows, columns] in BF16, or quantized in a format."""
    plain = folder / f"plain-{rows}"
    if not plain.exists():
        rng = np.random.default_rng(0)
        tensors = {
            f"model.layers.{n}.mlp.down_proj.weight": rng.normal(0, 0.05, (rows, columns))
            .astype(np.float32)
            .astype(ml_dtypes.bfloat16)
            for n in range(WEIGHTS)
        }
        write_checkpoint(plain, tensors, config={"model_type": "llama", "dtype": "bfloat16"})
    if layout is None:
        return plain
    target = folder / f"{layout}-{rows}"
    if not target.exists():
        fields = {"num_bits": 4, "group_size": 128} if layout in ("gptq", "gptq-v2", "ct-packed", "autoround") else {}
        run_plan(make_plan(Quantize(where=WHERE, format=layout, **fields), open_checkpoint(plain)), target, workers=1)
    return target


def peak_of(op: Any, source: Path, target: Path, cap: int, workers: int) -> int:
    """The peak of a process that does this and nothing else.

    Its own word for it (``VmHWM``): what ``wait4`` says of a child begins with what its parent held.
    """
    code = (
        "import ml_dtypes, re\n"
        f"from {type(op).__module__} import {type(op).__name__}\n"
        "from tensorsurgeon.checkpoint.folder import open_checkpoint\n"
        "from tensorsurgeon.planning.plan import make_plan\n"
        "from tensorsurgeon.running.run import run_plan\n"
        f"plan = make_plan({op!r}, open_checkpoint({str(source)!r}))\n"
        f"run_plan(plan, {str(target)!r}, workers={workers}, max_ram_bytes={cap})\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(target)
    return int(done.stdout) * 1024


def measure(name: str, op: Any, layout: str | None, folder: Path, rows: int, columns: int, workers: int) -> Measured:
    """One op on large weights under the smallest cap that its plan takes."""
    large = source_of(folder, rows, columns, layout)
    small = source_of(folder, 128, 128, layout)
    cap = make_plan(op, open_checkpoint(large)).peak_unit_bytes
    own = peak_of(op, small, folder / "out", 1 << 30, workers)
    return Measured(name, cap, peak_of(op, large, folder / "out", cap, workers), own)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="ops whose name has this in it")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    too_much = []
    print(f"weights of {given.rows} x {given.columns} in BF16, {given.workers} workers; MB")
    print(f"{'':28}{'cap':>8}{'peak':>8}{'own':>8}{'over':>8}")
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
        for name, op, layout in ops():
            if given.only not in name:
                continue
            try:
                found = measure(name, op, layout, Path(folder), given.rows, given.columns, given.workers)
            except SurgeonError as error:
                print(f"{name:28}  {error.message[:90]}")
                continue
            print(f"{name:28}" + "".join(f"{n / 1e6:8.0f}" for n in (found.cap, found.peak, found.own, found.over)), flush=True)
            too_much += [name] if found.over > CONSTANT_BYTES else []
    if too_much:
        print(f"more than {CONSTANT_BYTES / 1e6:.0f} MB over the cap: {', '.join(too_much)}")
    return bool(too_much and given.check)


if __name__ == "__main__":
    sys.exit(main())

"""The peak of whole runs, in processes of their own, against the cap; ``make bench-memory`` does every op and format."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.bench_memory import CONSTANT_BYTES, measure, ops
from tensorsurgeon.machine.limits import usable_cores

CHOSEN = ("transpose", "quantize gptq", "quantize ct-int", "dequantize hf-fp8", "dequantize gptq", "repack gptq ct-packed")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("name", CHOSEN)
def test_a_run_takes_no_more_than_its_cap_and_a_constant(name: str, tmp_path: Path) -> None:
    op, layout = next((op, layout) for found, op, layout in ops() if found == name)
    # 32 MB for a weight: four at once, or one whose scratch is not counted, would stand out.
    found = measure(name, op, layout, tmp_path, rows=8192, columns=2048, workers=min(4, 2 * usable_cores()))
    assert found.over <= CONSTANT_BYTES // 2, found

"""What very many tensors take: a scaled-down run of ``benchmarks/bench_many.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.bench_many import seen, write_many

# 500,000 tensors in 500 MB are a kilobyte each, with 60 MB for the interpreter. A plan that quantizes holds two outputs, a
# rewrite and a task for each weight.
BYTES_EACH = {("inspect",): 800, ("verify",): 800, ("plan", "fuse-experts"): 1500, ("plan", "ct-w8a8-int8"): 4000}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_tensor_takes_a_bounded_number_of_bytes(tmp_path: Path) -> None:
    count = write_many(tmp_path / "many", 30_000)
    write_many(tmp_path / "few", 150)
    taken = {}
    for arguments in BYTES_EACH:
        many, few = (seen(*arguments, str(tmp_path / name)) for name in ("many", "few"))
        assert "Traceback" not in many.said + few.said
        taken[arguments] = (many.peak - few.peak) / count
    assert all(taken[arguments] <= most for arguments, most in BYTES_EACH.items()), taken

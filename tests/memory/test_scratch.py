"""What each op says that it holds beside its inputs and outputs, measured; and pieces of large weights, to the same bytes."""

from __future__ import annotations

import tracemalloc
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.formats.registry import FORMATS
from tensorsurgeon.ops.cast import Cast
from tensorsurgeon.ops.concat import Concat
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.ops.repack import Repack
from tensorsurgeon.ops.split import Split
from tensorsurgeon.ops.transpose import Transpose
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.planning.rewriting import scratch_bytes
from tensorsurgeon.running.run import run_plan
from tests.checkpoints import apply, read_all, write_checkpoint
from tests.contract.ops import array_of
from tests.ops.arrays import BF16
from tests.ops.quantized import CONFIG, dense, quantize, write_quantized

# What Python and NumPy hold for a call, whatever its size.
SLACK = 1 << 18
SIDES: dict[str, dict[str, Any]] = {"symmetric": {}, "asymmetric": {"symmetric": False}, "channel": {"group_size": -1}}


def measured(op: Any, source: Path) -> list[tuple[str, int, int]]:
    """For each rewrite: its first input, the bytes that ``apply`` held beside inputs and outputs, and those it states."""
    checkpoint = open_checkpoint(source)
    tensors = read_all(source)
    found = []
    for rewrite in op.plan(checkpoint.specs):
        if rewrite.moves_bytes:
            continue
        inputs = [array_of(region, tensors) for region in rewrite.inputs]
        op.apply(rewrite, inputs)  # loads what it computes with
        tracemalloc.start()
        made = op.apply(rewrite, inputs)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # An output may be a view of an input or of an array that is larger: what counts is what was allocated.
        outputs = sum(prod(region.shape) * made[n].dtype.itemsize for n, region in enumerate(rewrite.outputs))
        found.append((str(rewrite.inputs[0]), peak - outputs, scratch_bytes(op, rewrite)))
    return found


def check(op: Any, source: Path) -> None:
    for name, held, stated in measured(op, source):
        assert held <= stated + SLACK, f"{name}: held {held} bytes, stated {stated}"


def test_surgery_holds_nothing_of_its_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(0, 1, (1024, 1024)).astype(np.float32) for name in ("a", "b")}
    source = write_checkpoint(tmp_path / "s", tensors)
    for op in (
        Transpose(where=("a",)),
        Split(where=("a",), into=("x", "y"), axis=1),
        Concat(parts=("a", "b"), into="x", axis=1),
        Cast(where=("a", "b"), dtype="BF16"),
        Cast(where=("a", "b"), dtype="F16"),
    ):
        check(op, source)


@pytest.mark.parametrize("layout", FORMATS)
def test_quantizing_and_dequantizing_hold_what_they_state(layout: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "float", dense(columns=1024, rows=2048), config=CONFIG)
    for side, fields in SIDES.items():
        try:
            plan = make_plan(quantize(layout, **fields), open_checkpoint(source))
        except SurgeonError:
            continue  # not every layout holds every scheme
        check(quantize(layout, **fields), source)
        run_plan(plan, tmp_path / side)
        check(Dequantize(), tmp_path / side)


PAIRS = [
    ("ct-int", "quark-int8"),
    ("gptq", "ct-packed"),
    ("ct-packed", "awq"),
    ("quark-int4", "gptq-v2"),
    ("awq", "autoround-awq"),
]


@pytest.mark.parametrize(("layout", "to"), PAIRS)
def test_repacking_holds_what_it_states(layout: str, to: str, tmp_path: Path) -> None:
    fields = {} if layout == "ct-int" else {"num_bits": 4, "group_size": 128}
    source = write_quantized(tmp_path / "q", layout, dense(columns=1024, rows=2048), **fields)
    check(Repack(to=to, inexact_scales="round"), source)


@pytest.mark.parametrize(("layout", "side"), product(FORMATS, SIDES))
def test_dequantizing_in_pieces_makes_the_same_bytes(
    layout: str, side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        source = write_quantized(tmp_path / "q", layout, dense(columns=256, rows=640), **SIDES[side])
    except SurgeonError:
        pytest.skip("this layout does not hold this scheme")
    apply(Dequantize(), source, tmp_path / "whole")
    monkeypatch.setattr("tensorsurgeon.ops.row_blocks.CHUNK_BYTES", 100_000)
    apply(Dequantize(), source, tmp_path / "pieces", workers=2)
    whole, pieces = read_all(tmp_path / "whole"), read_all(tmp_path / "pieces")
    assert {n: a.tobytes() for n, a in whole.items()} == {n: a.tobytes() for n, a in pieces.items()}
    assert all(a.dtype == BF16 for a in pieces.values())


@pytest.mark.parametrize("layout", ["ct-int", "ct-float", "quark-int8", "quark-fp8", "hf-fp8", "ct-nvfp4", "ct-mxfp4"])
def test_layouts_of_rows_are_read_in_pieces(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_quantized(tmp_path / "q", layout, dense(columns=256, rows=640))
    monkeypatch.setattr("tensorsurgeon.ops.row_blocks.CHUNK_BYTES", 100_000)
    plan = make_plan(Dequantize(), open_checkpoint(source))
    # Gate and up have 640 rows of 256, down has 256 rows of 640, in pieces of 128 or more.
    assert len(plan.units) >= 3 + 3 + 2


def test_repacking_in_pieces_makes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_quantized(tmp_path / "q", "ct-int", dense(columns=256, rows=640))
    op = Repack(to="quark-int8")
    apply(op, source, tmp_path / "whole")
    monkeypatch.setattr("tensorsurgeon.ops.row_blocks.CHUNK_BYTES", 100_000)
    assert len(make_plan(op, open_checkpoint(source)).units) > 3
    apply(op, source, tmp_path / "pieces")
    whole, pieces = read_all(tmp_path / "whole"), read_all(tmp_path / "pieces")
    assert {n: a.tobytes() for n, a in whole.items()} == {n: a.tobytes() for n, a in pieces.items()}

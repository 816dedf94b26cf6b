"""A weight from codes to codes goes row block by row block: the bytes of two runs, and never a float weight as a whole."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import NumericError
from tensorsurgeon.ops.assembled import Assembled
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.ops.on_the_way import for_source
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.planning.streams import streams_of
from tensorsurgeon.quant.scheme import Quantized
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan
from tests.checkpoints import assert_same, read_all, write_checkpoint

# More than 16 MB in F32, so that it is unpacked in pieces, of which the last is shorter than the others.
ROWS, COLUMNS = 2432, 2048
AT = "model.layers.0.mlp"
CONFIG = {"model_type": "llama", "hidden_size": COLUMNS, "num_hidden_layers": 1, "dtype": "bfloat16"}
SOURCES = {"hf-fp8": {}, "ct-packed": {"group_size": 32}, "ct-nvfp4": {}, "gptq": {"group_size": 128}}
TARGETS = {"awq": {"group_size": 64}, "ct-packed": {"group_size": 32, "symmetric": False}, "ct-nvfp4": {}, "quark-int4": {}}


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(2)
    tensors = {
        f"{AT}.{leaf}.weight": rng.normal(size=shape, scale=0.02).astype(ml_dtypes.bfloat16)
        for leaf, shape in (("gate_proj", (ROWS, COLUMNS)), ("up_proj", (ROWS, COLUMNS)), ("down_proj", (COLUMNS, ROWS)))
    }
    return write_checkpoint(tmp_path_factory.mktemp("floats") / "source", tensors, config=CONFIG)


@pytest.fixture(scope="module")
def stored(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, fields in SOURCES.items():
        made[name] = tmp_path_factory.mktemp(name) / "out"
        run_plan(make_plan(Quantize(where=("{path*}.weight",), format=name, **fields), open_checkpoint(floats)), made[name])
    return made


def planned(source: Path, target: str) -> Plan:
    return on_the_way(Quantize(where=("{path*}.weight",), format=target, **TARGETS[target]), source)


def on_the_way(step: Quantize, source: Path) -> Plan:
    checkpoint = open_checkpoint(source)
    return make_plan(for_source(step, checkpoint), checkpoint)


@pytest.mark.parametrize(
    ("source", "target"), [("hf-fp8", "awq"), ("ct-packed", "ct-nvfp4"), ("ct-nvfp4", "ct-packed"), ("gptq", "quark-int4")]
)
def test_bytes_are_those_of_two_runs(source: str, target: str, stored: dict[str, Path], tmp_path: Path) -> None:
    plan = planned(stored[source], target)
    assert all(streams_of(unit.tasks, plan.steps) for unit in plan.units if unit.tasks)
    run_plan(plan, tmp_path / "at_once", workers=2)
    run_plan(make_plan(load_transform("dequantize", {"dtype": "F32"}), open_checkpoint(stored[source])), tmp_path / "floats")
    run_plan(planned(tmp_path / "floats", target), tmp_path / "in_two")
    assert_same(read_all(tmp_path / "at_once"), read_all(tmp_path / "in_two"))


@pytest.mark.parametrize("source", ["hf-fp8", "ct-packed", "ct-nvfp4"])
@pytest.mark.parametrize("target", TARGETS)
def test_no_more_memory_than_from_bf16(source: str, target: str, stored: dict[str, Path], floats: Path) -> None:
    assert planned(stored[source], target).peak_unit_bytes <= planned(floats, target).peak_unit_bytes + (20 << 20)
    # A whole weight in F32 is not among it.
    if target != "ct-nvfp4":
        assert planned(stored[source], target).peak_unit_bytes < 2.5 * ROWS * COLUMNS * 4


def test_what_needs_all_rows_is_not_given_some(stored: dict[str, Path]) -> None:
    searched = Quantize(where=("{path*}.weight",), format="awq", group_size=64, clip_search=True)
    plan = on_the_way(searched, stored["hf-fp8"])
    assert not any(streams_of(unit.tasks, plan.steps) for unit in plan.units)


def test_rows_of_a_shape_that_others_contradict_stop_the_run(stored: dict[str, Path], tmp_path: Path) -> None:
    tensors = read_all(stored["ct-packed"])
    tensors[f"{AT}.up_proj.weight_shape"] = np.array([ROWS - 128, COLUMNS])
    source = write_checkpoint(tmp_path / "source", tensors, config=open_checkpoint(stored["ct-packed"]).config)
    with pytest.raises(
        NumericError, match=rf"up_proj: weight_shape says \[{ROWS - 128}, {COLUMNS}\], but the codes have {ROWS} rows"
    ):
        run_plan(make_plan(Dequantize(dtype="F32"), open_checkpoint(source)), tmp_path / "out")


def test_runs_of_rows_are_put_together() -> None:
    codes, scale = np.arange(60, dtype=np.int8).reshape(10, 6), np.arange(10, dtype=np.float32).reshape(5, 2)
    whole = Assembled(10)
    for start, stop in ((0, 4), (4, 8), (8, 10)):
        part = codes[start:stop].copy()
        whole.add(stop - start, Quantized(part, scale[start // 2 : stop // 2].copy(), None, np.float32([3])))
        part[:] = 0
    found = whole.whole()
    assert np.array_equal(found.codes, codes)
    assert np.array_equal(found.scale, scale)
    assert found.global_scale == np.float32([3])

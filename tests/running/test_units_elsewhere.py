"""A unit needs nothing of the process that planned it: op, rewrite, source and target travel, and the bytes are the same."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.sink import Sink
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan
from tensorsurgeon.running.unit import run_unit
from tensorsurgeon.tensors.arrays import workspace_of_thread

FIXTURE = Path(__file__).parents[2] / "fixtures" / "tiny-qwen3_5-moe"


def do_units(message: bytes, target: str) -> list[list[str]]:
    """What a worker elsewhere does with what it was sent."""
    units, steps, checkpoint, layout = pickle.loads(message)
    sink = Sink(Path(target), layout)
    sink.open()
    try:
        with Source(checkpoint) as source, workspace_of_thread() as workspace:
            return [run_unit(unit, steps, source, sink, workspace) for unit in units]
    finally:
        sink.sync()
        sink.close()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "w4"
    run_plan(make_plan(load_transform("ct-w4a16-g32"), open_checkpoint(FIXTURE)), target)
    return target


@pytest.mark.parametrize(
    ("transform", "parameters", "of_packed"),
    [
        ("ct-w4a16-g32", {}, False),
        ("nvfp4a16", {}, False),
        ("dequantize", {}, True),
        ("repack", {"to": "gptq", "inexact_scales": "round"}, True),
    ],
)
def test_units_run_in_another_process_from_what_they_carry(transform, parameters, of_packed, packed, tmp_path):
    plan = make_plan(load_transform(transform, parameters), open_checkpoint(packed if of_packed else FIXTURE))
    assert pickle.loads(pickle.dumps(plan)).fingerprint == plan.fingerprint
    run_plan(plan, tmp_path / "here")
    (tmp_path / "there").mkdir()
    message = pickle.dumps((plan.units, plan.steps, plan.source, plan.layout))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        digests = pool.apply(do_units, (message, str(tmp_path / "there")))
    assert len(digests) == len(plan.units)
    for shard in plan.layout.shards:
        assert (tmp_path / "there" / f"{shard.name}.partial").read_bytes() == (tmp_path / "here" / shard.name).read_bytes()

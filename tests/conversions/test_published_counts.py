"""On the real model's headers, each published conversion gives the published counts and sizes (formats.md section 9)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fixtures.make_skeleton import read_skeleton, write_skeleton
from tensorsurgeon.checkpoint.folder import Checkpoint, open_checkpoint
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.planning.report import plan_as_data
from tensorsurgeon.recipes.library import load_transform

HERE = Path(__file__).parents[2] / "fixtures" / "qwen3.6-35b-a3b"


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    target = tmp_path_factory.mktemp("skeleton") / "model"
    config = (HERE / "qwen3.6-35b-a3b.config.json").read_bytes()
    count, size = write_skeleton(target, read_skeleton(HERE / "qwen3.6-35b-a3b.tensors.json"), config, shards=26)
    assert (count, round(size / 2**30, 2)) == (1045, 66.97)
    assert len(list(target.glob("*.safetensors"))) == 26
    return open_checkpoint(target)


@pytest.mark.parametrize(
    ("transform", "parameters", "quantized", "gigabytes", "mtp_tensors"),
    [
        ("quark-w8a8-int8", {}, 31030, 38.4, 19),
        ("quark-w8a8-int8", {"mtp": "split"}, 31030, 38.4, 785),
        ("ct-w8a8-int8", {}, 31030, 38.3, 19),
        pytest.param("ct-w8a16", {"vision": False}, 30760, 39.5, 19, marks=pytest.mark.slow),
        ("ct-w8a16", {"vision": True}, 30870, 39.0, 19),
        pytest.param("autoround-int4-g128", {}, 30850, 22.3, 19, marks=pytest.mark.slow),
        ("ct-w4a16-g32", {}, 30970, 23.6, 19),
        pytest.param("ct-w4a16-g32", {"keep": []}, 31030, 23.6, 19, marks=pytest.mark.slow),
        ("gptq-int4-g128", {}, 30720, 24.4, 785),
        pytest.param("awq-int4-g128", {}, 30970, 22.1, 19, marks=pytest.mark.slow),
        ("fp8-block", {}, 30970, 38.3, 19),
        ("nvfp4a16", {}, 30970, 23.6, 19),
        pytest.param("mxfp4a16", {}, 30970, 22.5, 19, marks=pytest.mark.slow),
    ],
)
def test_a_published_conversion_has_the_published_counts_and_size(
    skeleton: Checkpoint, transform: str, parameters: dict[str, object], quantized: int, gigabytes: float, mtp_tensors: int
) -> None:
    plan = make_plan(load_transform(transform, parameters), skeleton)
    data = plan_as_data(plan)
    assert data["quantized_linears"] == quantized
    assert data["linears"] == 31181
    assert round(plan.output_bytes / 1e9, 1) == gigabytes
    assert sum(name.startswith("mtp.") for name in plan.specs) == mtp_tensors
    assert "quantization_config" in json.loads(plan.files.contents["config.json"])


def test_without_the_mtp_head_quark_int8_is_as_large_as_its_card_says(skeleton: Checkpoint) -> None:
    plan = make_plan(load_transform("quark-w8a8-int8"), skeleton)
    without_mtp = sum(spec.nbytes for name, spec in plan.specs.items() if not name.startswith("mtp."))
    assert round(without_mtp / 1e9, 1) == 36.7


def test_no_unit_of_any_conversion_needs_much_memory(skeleton: Checkpoint) -> None:
    plan = make_plan(load_transform("ct-w4a16-g32"), skeleton)
    assert plan.peak_unit_bytes < 100_000_000

"""A quantized source is dequantized in F32 on the way and quantized once, in one command."""

from __future__ import annotations

import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.planning.report import plan_as_data, plan_as_text
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan
from tests.checkpoints import FIXTURE, read_all


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """The fixture in FP8 blocks."""
    folder = tmp_path_factory.mktemp("fp8") / "model"
    run_plan(make_plan(load_transform("fp8-block"), open_checkpoint(FIXTURE)), folder)
    return folder


@pytest.mark.parametrize("transform", ["ct-w4a16-g32", "ct-w8a8-int8", "gptq-int4-g128"])
def test_from_fp8_in_one_command_is_dequantizing_in_f32_and_quantizing(transform, fp8, tmp_path):
    plan = make_plan(load_transform(transform), open_checkpoint(fp8))
    run_plan(plan, tmp_path / "at_once")
    run_plan(make_plan(Dequantize(dtype="F32"), open_checkpoint(fp8)), tmp_path / "floats")
    run_plan(make_plan(load_transform(transform), open_checkpoint(tmp_path / "floats")), tmp_path / "in_two")
    at_once, in_two = read_all(tmp_path / "at_once"), read_all(tmp_path / "in_two")
    assert at_once.keys() == in_two.keys()
    quantized = [name for name in at_once if name.rpartition(".")[0] in plan.quantized]
    assert len(quantized) > 100
    for name in quantized:
        assert at_once[name].tobytes() == in_two[name].tobytes(), name
    # What no step quantizes again is in the model's own dtype.
    others = {array.dtype.name for name, array in at_once.items() if name.rpartition(".")[0] not in plan.quantized}
    assert others <= {"bfloat16", "float32"}
    assert at_once["model.language_model.embed_tokens.weight"].dtype.name == "bfloat16"


def test_the_plan_says_what_was_read_and_the_config_forgets_it(fp8):
    plan = make_plan(load_transform("ct-w4a16-g32"), open_checkpoint(fp8))
    assert plan_as_data(plan)["dequantized"] == {"hf-fp8 (fp8 8 bits, block [128, 128])": len(plan.quantized)}
    assert "dequantized on the way" in plan_as_text(plan)
    assert b"weight_block_size" not in plan.files.contents["config.json"]

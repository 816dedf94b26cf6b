"""Repack: every code stays, what the target cannot say is refused; the round trips are in tests/conversions."""

from __future__ import annotations

import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import PlanError, SpecError, SurgeonError
from tensorsurgeon.ops.repack import Repack
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.running.run import run_plan
from tests.checkpoints import apply, folder_bytes, read_all
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.quantized import CONFIG, rewritten, write_quantized
from tests.ops.test_dequantize import CODES, INT8, SCALES

CT = {**CONFIG, "quantization_config": INT8}


class TestRepack(OpContract):
    CASES = (
        Case(
            "compressed_tensors_int8_to_quark",
            Repack(to="quark-int8"),
            {"m.a.weight": CODES, "m.a.weight_scale": SCALES, "m.a.bias": SCALES[0], "m.norm.weight": SCALES[0]},
            {"m.a.weight": CODES, "m.a.weight_scale": SCALES[:, 0], "m.a.bias": SCALES[0], "m.norm.weight": SCALES[0]},
            reversible=False,
            config=CT,
        ),
    )
    REFUSALS = (
        Refusal("not_quantized", Repack(to="gptq"), {"a.weight": SCALES}, PlanError, "not quantized", CONFIG),
        Refusal(
            "other_kind",
            Repack(to="hf-fp8"),
            {"m.a.weight": CODES, "m.a.weight_scale": SCALES},
            SpecError,
            "codes are int, but hf-fp8 holds fp8",
            CT,
        ),
        Refusal(
            "bits_that_the_target_does_not_have",
            Repack(to="awq"),
            {"m.a.weight": CODES, "m.a.weight_scale": SCALES},
            SpecError,
            "8",
            CT,
        ),
        Refusal(
            "static_scales_of_the_inputs_would_be_lost",
            Repack(to="quark-int8"),
            {"m.a.weight": CODES, "m.a.weight_scale": SCALES, "m.a.input_scale": SCALES[0]},
            PlanError,
            "m.a.input_scale: ct-int has no such tensor, and it would be lost",
            CT,
        ),
    )


def test_one_step_serves_two_sources_and_mixes_nothing(tmp_path):
    op = Repack(to="ct-packed", inexact_scales="keep")
    sources = [write_quantized(tmp_path / name, name, num_bits=4, group_size=32) for name in ("gptq", "gptq-v2")]
    plans = [make_plan(op, open_checkpoint(source)) for source in sources]
    for number, plan in enumerate(plans):
        run_plan(plan, tmp_path / f"t{number}")
    first, second = folder_bytes(tmp_path / "t0"), folder_bytes(tmp_path / "t1")
    assert {n: b for n, b in first.items() if n != "surgeon.json"} == {n: b for n, b in second.items() if n != "surgeon.json"}


def test_groups_that_the_target_cannot_hold_are_refused_while_planning(tmp_path):
    source = write_quantized(tmp_path / "q", "ct-packed", num_bits=8, group_size=32)
    with pytest.raises(SpecError, match="mlp"):
        make_plan(Repack(to="quark-int8"), open_checkpoint(source))


def test_an_order_of_inputs_that_no_other_layout_knows_is_refused(tmp_path):
    source = write_quantized(tmp_path / "q", "gptq", num_bits=4, group_size=32)

    def shuffle(tensors):
        for name in [n for n in tensors if n.endswith(".g_idx")]:
            tensors[name] = np.ascontiguousarray(tensors[name][::-1])

    with pytest.raises(SurgeonError, match=r"mlp.*(g_idx|desc_act|order)"):
        apply(Repack(to="ct-packed", inexact_scales="keep"), rewritten(tmp_path / "s", source, shuffle), tmp_path / "t")


def test_false_adds_zero_points_of_zero_and_true_takes_them_away(tmp_path):
    source = write_quantized(tmp_path / "q", "ct-packed", num_bits=4, group_size=32)
    apply(Repack(to="ct-packed", symmetric=False), source, tmp_path / "with")
    added = {n for n in read_all(tmp_path / "with") if n.endswith("weight_zero_point")}
    assert len(added) == 3
    apply(Repack(to="ct-packed", symmetric=True), tmp_path / "with", tmp_path / "without")
    before, after = read_all(source), read_all(tmp_path / "without")
    assert {n: a.tobytes() for n, a in before.items()} == {n: a.tobytes() for n, a in after.items()}

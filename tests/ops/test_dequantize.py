"""Dequantize: codes times scales, from every layout, wherever the scales lie; nothing of the codes is lost unsaid."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import NumericError, PlanError, SurgeonError
from tensorsurgeon.formats.registry import FORMATS
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.running.run import run_plan
from tensorsurgeon.tensors.dtypes import DTYPES
from tests.checkpoints import apply, assert_same, read_all, write_checkpoint
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import BF16
from tests.ops.quantized import CONFIG, MLP, config_of, dense, quantize, rewritten, write_quantized

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
        }
    },
    "ignore": [],
}
CODES = np.array([[127, -128], [3, 0]], np.int8)
SCALES = np.array([[0.5], [3.0]], np.float32)


class TestDequantize(OpContract):
    CASES = tuple(
        Case(
            name,
            Dequantize(dtype=name),
            {"m.a.weight": CODES, "m.a.weight_scale": SCALES, "m.a.bias": SCALES[0], "m.norm.weight": SCALES[0]},
            {
                "m.a.weight": np.array([[63.5, -64], [9, 0]]).astype(DTYPES[name].numpy),
                "m.a.bias": SCALES[0],
                "m.norm.weight": SCALES[0],
            },
            reversible=False,
            config={**CONFIG, "quantization_config": INT8},
        )
        for name in ("BF16", "F16", "F32")
    )
    REFUSALS = (
        Refusal("not_quantized", Dequantize(), {"a.weight": SCALES}, PlanError, "the checkpoint is not quantized", CONFIG),
        Refusal(
            "unknown_method",
            Dequantize(),
            {"a.weight": CODES},
            SurgeonError,
            "cannot read 'hqq'",
            {"quantization_config": {"quant_method": "hqq"}},
        ),
        Refusal(
            "a_tensor_that_the_layout_does_not_know",
            Dequantize(),
            {"m.a.weight": CODES, "m.a.weight_scale": SCALES, "m.a.low_rank": SCALES},
            PlanError,
            "m.a.low_rank: ct-int has no such tensor, and it would be lost",
            {**CONFIG, "quantization_config": INT8},
        ),
    )


def by_hand(layout, quantized, scheme):
    """``(codes - zero_point) * scale`` in float64, rounded once; no backend has a hand in it."""
    scale, codes = quantized.scale.astype(np.float64), quantized.codes
    codes = E2M1[codes] if codes.dtype == np.uint8 else codes.astype(np.float64)
    rows, columns = codes.shape
    scale = np.repeat(np.repeat(scale, -(-rows // scale.shape[0]), 0)[:rows], -(-columns // scale.shape[1]), 1)[:, :columns]
    if quantized.zero_point is not None:
        codes = codes - np.repeat(quantized.zero_point.astype(np.float64), columns // quantized.zero_point.shape[1], 1)
    if quantized.global_scale is not None:
        scale = scale / quantized.global_scale.astype(np.float64)
    return codes * scale


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_layout_gives_codes_times_scale(name, tmp_path):
    source = write_quantized(tmp_path / "q", name)
    apply(Dequantize(dtype="F32"), source, tmp_path / "f32")
    found, stored = read_all(tmp_path / "f32"), read_all(source)
    assert found.keys() == dense().keys()
    assert "quantization_config" not in config_of(tmp_path / "f32")
    op = quantize(name)
    scheme = op.layout.resolve_scheme(op.scheme, DTYPES["BF16"])
    for weight in (n for n in found if ".mlp." in n):
        prefix = weight.removesuffix("weight")
        arrays = {n.removeprefix(prefix): a for n, a in stored.items() if n.startswith(prefix)}
        wanted = by_hand(name, op.layout.unpack(arrays, scheme), scheme)
        # NVFP4 multiplies and divides in float32; all others round a product once.
        np.testing.assert_allclose(found[weight], wanted, rtol=2**-22 if name == "ct-nvfp4" else 2**-24, atol=0)


@pytest.mark.parametrize("name", ["hf-fp8", "ct-float", "ct-nvfp4"])
def test_scales_may_lie_in_another_shard_than_their_codes(name, tmp_path):
    source = write_quantized(tmp_path / "q", name)
    apply(Dequantize(), source, tmp_path / "one")
    for seed in range(3):
        spread = rewritten(tmp_path / f"s{seed}", source, lambda tensors: None, shards=5, seed=seed)
        opened = open_checkpoint(spread)
        shards = {n: opened.location(n).shard for n in opened.specs if ".up_proj." in n}
        apply(Dequantize(), spread, tmp_path / f"t{seed}", workers=2)
        one, other = read_all(tmp_path / "one"), read_all(tmp_path / f"t{seed}")
        assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in other.items()}
        if len(set(shards.values())) > 1:
            return
    pytest.fail("no draw put the scales elsewhere")


def test_one_step_serves_two_sources_and_mixes_nothing(tmp_path):
    """GPTQ v1 and v2 differ in nothing that a rewrite shows: every zero point would be read off by one."""
    op = Dequantize(dtype="F32")
    sources = [write_quantized(tmp_path / name, name, num_bits=4, group_size=32) for name in ("gptq", "gptq-v2")]
    plans = [make_plan(op, open_checkpoint(source)) for source in sources]
    for number, plan in enumerate(plans):
        run_plan(plan, tmp_path / f"t{number}")
    first, second = read_all(tmp_path / "t0"), read_all(tmp_path / "t1")
    assert {n: a.tobytes() for n, a in first.items()} == {n: a.tobytes() for n, a in second.items()}


def test_symmetric_codes_with_zero_points_that_are_not_zero_are_refused(tmp_path):
    source = write_quantized(tmp_path / "q", "quark-int4", group_size=32)

    def with_zero_points(value):
        def change(tensors):
            for name in [n for n in tensors if n.endswith(".weight_scale")]:
                scale = tensors[name]
                zeros = np.full((scale.shape[0], scale.shape[1] // 8), value, np.int32)
                tensors[name.removesuffix("scale") + "zero_point"] = zeros

        return change

    apply(Dequantize(), source, tmp_path / "plain")
    apply(Dequantize(), rewritten(tmp_path / "s0", source, with_zero_points(0)), tmp_path / "t0")
    assert read_all(tmp_path / "t0")[f"{MLP}.up_proj.weight"].tobytes() == (
        read_all(tmp_path / "plain")[f"{MLP}.up_proj.weight"].tobytes()
    )
    with pytest.raises(NumericError, match=r"mlp.*weight_zero_point is not zero, but the config says"):
        apply(Dequantize(), rewritten(tmp_path / "s1", source, with_zero_points(1)), tmp_path / "t1")


def test_static_scales_of_the_inputs_go_with_the_quantization(tmp_path):
    source = write_quantized(tmp_path / "q", "hf-fp8")

    def with_inputs(tensors):
        for module in [n.removesuffix(".weight") for n in tensors if n.endswith("proj.weight")]:
            tensors[f"{module}.input_scale"] = np.asarray(0.5, np.float32)

    apply(Dequantize(), rewritten(tmp_path / "s", source, with_inputs), tmp_path / "t")
    assert read_all(tmp_path / "t").keys() == dense().keys()


def test_dequantizing_what_was_dequantized_is_refused(tmp_path):
    source = write_quantized(tmp_path / "q", "ct-int")
    plan = make_plan(Dequantize(), open_checkpoint(source))
    run_plan(plan, tmp_path / "t")
    with pytest.raises(PlanError, match="not quantized"):
        make_plan(Dequantize(), open_checkpoint(tmp_path / "t"))


def test_a_model_that_was_written_as_float_8_weights_comes_back_within_half_a_step(tmp_path):
    weight = np.linspace(-1, 1, 128 * 128, dtype=np.float32).reshape(128, 128).astype(BF16)
    source = write_checkpoint(tmp_path / "s", {"a.weight": weight}, config=CONFIG)
    chain_source = tmp_path / "q"
    run_plan(make_plan(quantize_one("hf-fp8"), open_checkpoint(source)), chain_source)
    apply(Dequantize(), chain_source, tmp_path / "t")
    error = np.abs(read_all(tmp_path / "t")["a.weight"].astype(np.float64) - weight.astype(np.float64))
    # E4M3 has 4 significant bits: half a step is 1/16 of a value, and BF16 adds 1/256.
    assert np.all(error <= np.abs(weight.astype(np.float64)) * (1 / 16 + 1 / 256) + 2.0**-10 / 448)
    assert read_all(chain_source)["a.weight"].dtype == ml_dtypes.float8_e4m3fn


def quantize_one(layout):
    return quantize(layout).__class__(where=("a.weight",), format=layout)


def test_the_shape_beside_packed_words_may_be_in_i32_as_kimi_has_it(tmp_path):
    source = write_quantized(tmp_path / "q", "ct-packed")
    apply(Dequantize(), source, tmp_path / "wide")

    def narrow(tensors):
        for name in [name for name in tensors if name.endswith("weight_shape")]:
            tensors[name] = tensors[name].astype(np.int32)

    apply(Dequantize(), rewritten(tmp_path / "n", source, narrow), tmp_path / "narrow")
    assert_same(read_all(tmp_path / "narrow"), read_all(tmp_path / "wide"))

from __future__ import annotations

import re

import numpy as np
import pytest

from tensorsurgeon.errors import CheckpointError, ConfigError
from tensorsurgeon.formats.gptq import Gptq
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F16, I32
from tensorsurgeon.tensors.spec import TensorSpec
from tests.contract.formats import Case, FormatContract, Mutation, Refusal
from tests.contract.goldens import Golden, GoldenContract
from tests.contract.written_models import under, written

V1, V2, BARE = Gptq(), Gptq("gptq_v2"), Gptq(g_idx=False)
EDGES = ("edges", "half", "single")
WEIGHT = TensorSpec("m.weight", BF16, (64, 128))


def w(num_bits: int, group_size: int, symmetric: bool = True) -> Scheme:
    return Scheme(num_bits=num_bits, group_size=group_size, symmetric=symmetric, rule="gptq")


class TestGptq(FormatContract):
    CASES = (
        Case(V1, w(4, 32), 32, 32),
        Case(V1, w(8, 128), 32, 32),
        Case(BARE, w(4, -1), 32, 32),
        *(Case(V2, w(bits, 64, symmetric=False), 32, 32) for bits in (2, 3, 4, 8)),
        Case(Gptq("gptq_v2", g_idx=False), Scheme(num_bits=4, group_size=32, rule="gptq", scale_dtype=BF16), 32, 32),
    )
    REFUSALS = (
        Refusal(V1, WEIGHT, w(5, 32), "num_bits 2 or 3 or 4 or 8, found 5"),
        Refusal(V1, WEIGHT, w(4, 32, symmetric=False), "write asymmetric weights in the format gptq-v2"),
        Refusal(V1, TensorSpec("m.weight", BF16, (20, 128)), w(4, 32), "out_features divisible by 32 .* found 20"),
        Refusal(V1, TensorSpec("m.weight", BF16, (32, 80)), w(4, -1), "in_features divisible by 32"),
        Refusal(V1, TensorSpec("m.weight", BF16, (32, 96)), w(4, 64), "use a divisor such as 48 or 96"),
    )
    MUTATIONS = (
        Mutation(("bits",), 5, "bits: found 5"),
        Mutation(("bits",), None, "bits: found None"),
        Mutation(("group_size",), None, "group_size: expected an integer, found None"),
        Mutation(("desc_act",), True, "desc_act: found true"),
        Mutation(("checkpoint_format",), "marlin", "checkpoint_format: found 'marlin'"),
        Mutation(("checkpoint_format",), "gptq_v2", "expected 'gptq'"),
        Mutation(("dynamic",), {"-:.*linear_attn.*": {}}, "dynamic: says model.language_model.layers.0.linear_attn"),
        Mutation(("dynamic",), {"+:(": {}}, "not a valid expression"),
        Mutation(("dynamic",), {".*out_proj": {"desc_act": True}}, "desc_act"),
    )


class TestGptqGolden(GoldenContract):
    # GPTQModel takes amax / 15 for a group whose minimum is exactly 0 or above, and clips half of it (formats.md).
    GOLDENS = (
        Golden("gptqmodel-int4-channel-v1", V1, w(4, -1), unlike=EDGES),
        Golden("gptqmodel-int4-g32-v1", V1, w(4, 32), unlike=EDGES, overflown=("extremes",)),
        Golden("gptqmodel-int4-g128-v1", V1, w(4, 128), unlike=EDGES, overflown=("extremes",)),
        Golden("gptqmodel-int8-g32-v1", V1, w(8, 32), unlike=EDGES),
        Golden("gptqmodel-int8-g128-v2", V2, w(8, 128), unlike=EDGES),
        Golden("gptqmodel-int4-g32-v2", V2, w(4, 32), unlike=EDGES),
        Golden("gptqmodel-int4-g32-asym-v2", V2, w(4, 32, symmetric=False)),
        Golden("gptqmodel-int4-g32-asym-v1", V1, w(4, 32, symmetric=False), refused_by_check=("normal", "edges")),
    )


@pytest.mark.parametrize(
    ("layout", "num_bits", "word", "zero"),
    [
        (V1, 4, 0x76543210, 0x77777777),
        (V2, 4, 0x76543210, 0x88888888),
        (V1, 8, 0x03020100, 0x7F7F7F7F),
        (V2, 8, 0x03020100, 0x80808080),
    ],
)
def test_words_of_codes_and_of_the_symmetric_zero_point(layout, num_bits, word, zero):
    scheme = layout.resolve_scheme(w(num_bits, -1), BF16)
    row = np.arange(32) % (1 << num_bits) - (1 << (num_bits - 1))
    quantized = Quantized(np.tile(row.astype(np.int8), (32, 1)), np.ones((32, 1), np.float32))
    qweight, qzeros, scales, g_idx = layout.pack(quantized, scheme)
    assert qweight.view(np.uint32)[0].tolist() == [word] * 32
    assert set(qzeros.view(np.uint32).flat) == {zero}
    assert (qweight.shape, qzeros.shape, scales.shape) == ((num_bits, 32), (1, num_bits), (1, 32))
    assert g_idx.tolist() == [0] * 32


def test_planned_tensors():
    assert V1.tensors(WEIGHT, w(4, 32)) == (
        TensorSpec("qweight", I32, (16, 64)),
        TensorSpec("qzeros", I32, (4, 8)),
        TensorSpec("scales", F16, (4, 64)),
        TensorSpec("g_idx", I32, (128,)),
    )
    assert len(BARE.tensors(WEIGHT, w(4, 32))) == 3


def test_activation_order_is_refused_by_the_first_input_out_of_place():
    scheme = V1.resolve_scheme(w(4, 32), BF16)
    quantized = Quantized(np.zeros((32, 64), np.int8), np.ones((32, 2), np.float32))
    arrays = dict(zip(("qweight", "qzeros", "scales", "g_idx"), V1.pack(quantized, scheme), strict=True))
    arrays["g_idx"] = arrays["g_idx"][::-1].copy()
    with pytest.raises(CheckpointError, match="g_idx puts input 0 into group 1 instead of 0"):
        V1.unpack(arrays, scheme)


def test_zero_points_of_the_other_convention_are_refused():
    scheme = V1.resolve_scheme(w(4, 32), BF16)
    quantized = Quantized(np.zeros((32, 64), np.int8), np.ones((32, 2), np.float32))
    arrays = dict(zip(("qweight", "qzeros", "scales", "g_idx"), V1.pack(quantized, scheme), strict=True))
    with pytest.raises(CheckpointError, match=r"all 8, but one is 7.*GPTQ v1 or v2"):
        V2.unpack(arrays, scheme)


def matches(dynamic: dict[str, dict], name: str) -> str | None:
    """The first rule that hits, as vLLM and GPTQModel look for it."""
    return next((key for key in dynamic if re.match(key[2:], name)), None)


def test_rules_keep_out_what_engines_call_by_fused_or_renamed_names_and_nothing_else():
    model = written(V1, under(V1.resolve_scheme(w(4, 32), BF16)))
    dynamic = V1.config_files(model).quantization_config["dynamic"]
    assert all(key.startswith("-:") and value == {} for key, value in dynamic.items())
    for prefix in ("model.language_model.", "language_model.model.", "model."):
        for leaf in ("linear_attn.in_proj_a", "linear_attn.in_proj_ba", "mlp.gate", "mlp.shared_expert_gate"):
            assert matches(dynamic, f"{prefix}layers.2.{leaf}"), (prefix, leaf)
        for leaf in (
            "linear_attn.in_proj_qkv", "linear_attn.in_proj_qkvz", "self_attn.qkv_proj", "mlp.experts",
            "mlp.experts.0.gate_proj", "mlp.shared_expert.gate_up_proj", "mlp.shared_expert.gate_proj",
        ):  # fmt: skip
            assert matches(dynamic, f"{prefix}layers.2.{leaf}") is None, (prefix, leaf)
    assert matches(dynamic, "visual.blocks.1.attn.qkv")
    assert matches(dynamic, "language_model.lm_head")
    assert matches(dynamic, "mtp.layers.0.mlp.experts") == "-:.*mtp.*"


def test_mtp_rule_only_beside_a_float_mtp_head():
    scheme = V1.resolve_scheme(w(4, 32), BF16)
    weights = (spec for spec in written(V1, lambda module: None).specs.values() if not spec.name.startswith("mtp"))
    dynamic = V1.config_files(written(V1, under(scheme), weights)).quantization_config["dynamic"]
    assert not any("mtp" in key for key in dynamic)


def test_layers_with_other_bits_get_a_rule_of_their_own():
    four, eight = (V1.resolve_scheme(w(bits, 32), BF16) for bits in (4, 8))

    def mixed(module: str) -> Scheme | None:
        base = under(four)(module)
        return eight if base and ".self_attn." in module else base

    model = written(V1, mixed)
    config = V1.config_files(model).quantization_config
    assert config["bits"] == 4
    assert matches(config["dynamic"], "language_model.model.layers.3.self_attn.qkv_proj").startswith("+:")
    assert V1.read_config(config, model.specs) == dict(model.modules)


def test_config_of_a_checkpoint_without_its_scales_is_refused():
    model = written(V1, under(V1.resolve_scheme(w(4, 32), BF16)))
    config = V1.config_files(model).quantization_config
    del model.specs["model.language_model.layers.0.linear_attn.out_proj.scales"]
    with pytest.raises(ConfigError, match=r"has no model\.language_model\.layers\.0\.linear_attn\.out_proj\.scales"):
        V1.read_config(config, model.specs)


def test_v1_zero_points_of_0_borrow_from_their_neighbours_as_in_gptqmodel():
    zero_point = np.full((32, 1), -8, np.int8)
    zero_point[1::2] = 3
    quantized = Quantized(np.zeros((32, 32), np.int8), np.ones((32, 1), np.float32), zero_point)
    scheme = V1.resolve_scheme(w(4, -1, symmetric=False), BF16)
    arrays = dict(zip(("qweight", "qzeros", "scales", "g_idx"), V1.pack(quantized, scheme), strict=True))
    assert set(arrays["qzeros"].view(np.uint32).flat) == {0xB0B0B0B0 - 0x11111111}
    assert (V1.unpack(arrays, scheme).zero_point == zero_point).all()


def test_a_stored_zero_point_of_0_minus_one_is_refused_where_nobody_says_who_wrote_it():
    """AutoGPTQ's kind lets each field wrap, GPTQModel borrows from the next; read the other way, neighbours are off by one."""
    zero_point = np.full((32, 1), 3, np.int8)
    zero_point[5] = -8
    quantized = Quantized(np.zeros((32, 32), np.int8), np.ones((32, 1), np.float32), zero_point)
    scheme = V1.resolve_scheme(w(4, -1, symmetric=False), BF16)
    arrays = dict(zip(("qweight", "qzeros", "scales", "g_idx"), V1.pack(quantized, scheme), strict=True))
    config = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": False}
    said = Gptq.from_config({**config, "meta": {"quantizer": ["gptqmodel:6.0.3"]}}, {})
    assert (said.unpack(arrays, scheme).zero_point == zero_point).all()
    for meta in ({}, {"meta": None}, {"meta": []}, {"meta": {"quantizer": ["another:1"]}}):
        with pytest.raises(CheckpointError, match=r"zero point is stored as 15.*gptqmodel"):
            Gptq.from_config({**config, **meta}, {}).unpack(arrays, scheme)
        zero_points = {**arrays, "qzeros": np.full_like(arrays["qzeros"], 0x22222222)}
        assert (Gptq.from_config({**config, **meta}, {}).unpack(zero_points, scheme).zero_point == 3 - 8).all()


@pytest.mark.parametrize("meta", [5, "x", [], [1], None, True, {"static_groups": 5}, {"quantizer": {"a": 1}}])
def test_meta_of_any_kind_is_read_past(meta):
    model = written(V1, under(V1.resolve_scheme(w(4, 32), BF16)))
    config = {**V1.config_files(model).quantization_config, "meta": meta}
    assert Gptq.from_config(config, model.specs).read_config(config, model.specs) == dict(model.modules)

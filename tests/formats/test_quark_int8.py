from __future__ import annotations

from tensorsurgeon.formats.quark_int8 import QuarkInt8
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16, F32, I8
from tensorsurgeon.tensors.spec import TensorSpec
from tests.contract.formats import Case, FormatContract, Mutation, Refusal
from tests.contract.goldens import Golden, GoldenContract
from tests.contract.written_models import under, written

LAYOUT = QuarkInt8()
W8 = Scheme(rule="quark")
WEIGHT = TensorSpec("m.weight", BF16, (8, 96))
GENERAL = ("global_quant_config", "weight")


class TestQuarkInt8(FormatContract):
    CASES = (Case(LAYOUT, W8), Case(LAYOUT, Scheme(rule="quark", scale_dtype=BF16)))
    REFUSALS = (
        Refusal(LAYOUT, WEIGHT, Scheme(num_bits=4), "num_bits 8, found 4"),
        Refusal(LAYOUT, WEIGHT, Scheme(group_size=32), "group_size -1, found 32"),
        Refusal(LAYOUT, WEIGHT, Scheme(symmetric=False), "symmetric True, found False"),
        Refusal(LAYOUT, TensorSpec("m.weight", I8, (8, 8)), W8, "BF16, F16, F32 weights, found I8"),
        Refusal(LAYOUT, TensorSpec("x.experts.up", BF16, (2, 8, 8)), W8, "split the experts first"),
        Refusal(LAYOUT, TensorSpec("m.weight", BF16, (0, 8)), W8, "no empty weight"),
    )
    MUTATIONS = (
        Mutation((*GENERAL, "dtype"), "int16", r"global_quant_config\.weight\.dtype: found 'int16'"),
        Mutation((*GENERAL, "symmetric"), False, r"weight\.symmetric: found False"),
        Mutation((*GENERAL, "is_dynamic"), True, "is_dynamic"),
        Mutation(("global_quant_config",), None, r"global_quant_config: expected a mapping"),
        Mutation(("exclude",), ["model.language_model.layers.0.linear_attn.out_proj"], "exclude: says model"),
        Mutation(("exclude",), [], "exclude: nothing keeps model.visual"),
        Mutation(("exclude",), "lm_head", "expected a list of strings"),
        Mutation(("layer_type_quant_config",), {"Linear": {}}, "layer_type_quant_config"),
    )


def test_scale_is_a_vector_in_f32_because_vllm_experts_take_nothing_else():
    assert LAYOUT.tensors(WEIGHT, LAYOUT.resolve_scheme(W8, BF16)) == (
        TensorSpec("weight", I8, (8, 96)),
        TensorSpec("weight_scale", F32, (8,)),
    )


def test_config_has_what_vllm_needs_and_excludes_by_name():
    config = LAYOUT.config_files(written(LAYOUT, under(LAYOUT.resolve_scheme(W8, BF16)))).quantization_config
    assert config["export"]["kv_cache_group"] == []
    assert config["export"]["pack_method"] == "order"
    assert config["layer_type_quant_config"] == {}
    assert config["exclude"][:3] == [
        "model.visual.blocks.0.attn.qkv",
        "model.visual.blocks.0.attn.proj",
        "model.visual.blocks.0.mlp.linear_fc1",
    ]
    assert config["exclude"][-2:] == ["lm_head", "re:^mtp.*"]
    assert not any("*" in entry for entry in config["exclude"] if not entry.startswith("re:"))


class TestQuarkInt8Golden(GoldenContract):
    GOLDENS = (Golden("quark-int8", LAYOUT, W8, extra=("weight_zero_point",)), Golden("quark_file-int8", LAYOUT, W8))

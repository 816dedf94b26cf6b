from __future__ import annotations

from tensorsurgeon.formats.ct_int import CtInt
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16, F16, F32
from tensorsurgeon.tensors.spec import TensorSpec
from tests.contract.formats import Case, FormatContract, Mutation, Refusal
from tests.contract.goldens import Golden, GoldenContract

LAYOUT = CtInt()
W8 = Scheme()
WEIGHT = TensorSpec("m.weight", BF16, (8, 96))
GROUP = ("config_groups", "group_0")


class TestCtInt(FormatContract):
    CASES = (Case(LAYOUT, W8), Case(LAYOUT, W8, weight_dtype=F16), Case(LAYOUT, Scheme(scale_dtype=F32)))
    REFUSALS = (
        Refusal(LAYOUT, WEIGHT, Scheme(num_bits=4), "num_bits 8, found 4"),
        Refusal(LAYOUT, WEIGHT, Scheme(group_size=32), "group_size -1, found 32"),
        Refusal(LAYOUT, WEIGHT, Scheme(type="fp8"), "type int, found fp8"),
        Refusal(LAYOUT, WEIGHT, Scheme(symmetric=False), "symmetric"),
    )
    MUTATIONS = (
        Mutation(("config_groups",), {}, "config_groups: has no group"),
        Mutation((*GROUP, "format"), "pack-quantized", r"group_0\.format: found 'pack-quantized'"),
        Mutation((*GROUP, "weights", "num_bits"), 4, r"group_0\.weights\.num_bits: found 4"),
        Mutation((*GROUP, "weights", "strategy"), "tensor", "strategy: found 'tensor'"),
        Mutation((*GROUP, "weights", "actorder"), "group", "actorder: found 'group'"),
        Mutation((*GROUP, "weights", "dynamic"), True, r"weights\.dynamic"),
        Mutation((*GROUP, "weights", "num_bit"), 8, "unknown key with value 8; did you mean 'num_bits'"),
        Mutation((*GROUP, "targets"), ["re:.*self_attn.*"], "says model.language_model.layers.0.linear_attn.in_proj_qkv"),
        Mutation(("ignore",), ["lm_head"], "nothing keeps model.visual.blocks.0.attn.qkv out"),
        Mutation(("ignore",), ["re:.*"], "says model.language_model.layers.0"),
        Mutation(("sparsity_config",), {"format": "sparse-24-bitmask"}, "sparsity_config"),
    )


class TestCtIntGolden(GoldenContract):
    GOLDENS = (Golden("llmcompressor-w8a8", LAYOUT, W8),)

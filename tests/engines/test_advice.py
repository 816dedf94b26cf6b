"""Advice of engines on plans: every rule objects where it should and is silent where it should be.

Checkpoints are headers without data; what the real engines did with converted ones is in docs/engines.md, and the
last tests hold the rules' constants against the engines that are installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from fixtures.make_skeleton import read_skeleton, write_skeleton
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.cli import main
from tensorsurgeon.engines.advice import (
    advice_as_data,
    advice_as_text,
    advise,
    advise_all,
    check_requirements,
    parse_requirement,
)
from tensorsurgeon.engines.base import Advice, Target, loads
from tensorsurgeon.engines.facts import facts_of
from tensorsurgeon.engines.registry import ENGINES, engine_named
from tensorsurgeon.engines.sharding import Experts, Heads, Linear
from tensorsurgeon.errors import EngineError, RecipeError
from tensorsurgeon.formats.registry import FORMATS
from tensorsurgeon.planning.output_files import OutputFiles
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.recipes.library import load_transform
from tests.checkpoints import FIXTURE, apply

REPOSITORY = Path(__file__).parents[2]
SKELETON = REPOSITORY / "fixtures" / "qwen3.6-35b-a3b"
VLLM = REPOSITORY / ".venvs" / "vllm" / "bin" / "python"
LAYERS = "model.language_model.layers"
EXPERTS = f"{LAYERS}.*.mlp.experts"
IN_PROJ_BA = ["{path*}.in_proj_a.weight", "{path*}.in_proj_b.weight"]
NO_MTP_NO_GATES = ["maybe:{path*}norm.weight", "maybe:{path*}.conv1d.weight", "maybe:mtp.{rest*}", "maybe:{path*}visual.{rest*}"]


def headers(
    *, hidden: int = 2048, inner: int = 512, shared: int = 512, experts: int = 2, split: tuple[int, ...] = ()
) -> dict[str, list[Any]]:
    """One layer of linear attention, one of full attention, a vision block, a head and an MTP head, as Qwen3.6 has them.

    ``split``: layers whose experts are stored one by one.
    """
    shapes: dict[str, list[int]] = {
        "model.language_model.embed_tokens.weight": [1024, hidden],
        "lm_head.weight": [1024, hidden],
        "model.visual.blocks.0.attn.qkv.weight": [3456, 1152],
        "model.visual.blocks.0.attn.proj.weight": [1152, 1152],
        "model.visual.blocks.0.mlp.linear_fc1.weight": [4304, 1152],
        "model.visual.blocks.0.mlp.linear_fc2.weight": [1152, 4304],
        "mtp.fc.weight": [hidden, 2 * hidden],
        "mtp.norm.weight": [hidden],
    }
    attention = {"q_proj": [8192, hidden], "k_proj": [512, hidden], "v_proj": [512, hidden], "o_proj": [hidden, 4096]}
    recurrent = {
        "in_proj_qkv": [8192, hidden], "in_proj_z": [4096, hidden], "in_proj_b": [32, hidden], "in_proj_a": [32, hidden],
        "out_proj": [hidden, 4096],
    }  # fmt: skip
    for at, mixer in ((f"{LAYERS}.0.", "linear_attn"), (f"{LAYERS}.1.", "self_attn"), ("mtp.layers.0.", "self_attn")):
        for leaf, shape in (recurrent if mixer == "linear_attn" else attention).items():
            shapes[f"{at}{mixer}.{leaf}.weight"] = shape
        shapes |= {
            f"{at}input_layernorm.weight": [hidden],
            f"{at}mlp.gate.weight": [experts, hidden],
            f"{at}mlp.shared_expert_gate.weight": [1, hidden],
            f"{at}mlp.shared_expert.gate_proj.weight": [shared, hidden],
            f"{at}mlp.shared_expert.up_proj.weight": [shared, hidden],
            f"{at}mlp.shared_expert.down_proj.weight": [hidden, shared],
        }
        if at.startswith("model") and int(at[-2]) in split:
            for n in range(experts):
                one = f"{at}mlp.experts.{n}."
                shapes |= {f"{one}{leaf}_proj.weight": [inner, hidden] for leaf in ("gate", "up")}
                shapes[f"{one}down_proj.weight"] = [hidden, inner]
        else:
            shapes[f"{at}mlp.experts.gate_up_proj"] = [experts, 2 * inner, hidden]
            shapes[f"{at}mlp.experts.down_proj"] = [experts, hidden, inner]
    return {name: ["BF16", shape] for name, shape in shapes.items()}


CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": {
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "num_experts": 2, "num_hidden_layers": 2,
        "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
    },
}  # fmt: skip

Maker = Callable[..., Plan]


@pytest.fixture
def planned(tmp_path: Path) -> Maker:
    """Plans a transform over headers."""

    def plan(
        transform: str | None,
        parameters: Mapping[str, Any] | None = None,
        *,
        tensors: dict[str, list[Any]] | None = None,
        config: Mapping[str, Any] = CONFIG,
        **sizes: Any,
    ) -> Plan:
        folder = tmp_path / f"source{len(list(tmp_path.iterdir()))}"
        text = config["text_config"] | {
            "hidden_size": sizes.get("hidden", 2048),
            "moe_intermediate_size": sizes.get("inner", 512),
        }
        write_skeleton(folder, tensors or headers(**sizes), json.dumps({**config, "text_config": text}).encode(), shards=1)
        steps: Any = [] if transform is None else load_transform(transform, parameters)
        return make_plan(steps, open_checkpoint(folder))

    return plan


def with_settings(plan: Plan, **changed: Any) -> Plan:
    """The plan with other keys in its quantization_config, as another writer might have left them; None removes one."""
    config = json.loads(plan.files.contents["config.json"])
    settings = config["quantization_config"] | changed
    config["quantization_config"] = {k: v for k, v in settings.items() if v is not None}
    contents = plan.files.contents | {"config.json": json.dumps(config).encode()}
    return replace(plan, files=OutputFiles(contents, plan.files.copied))


def linears(format_: str, **parameters: Any) -> tuple[str, dict[str, Any]]:
    return "quantize-linears", {"format": format_, **parameters}


def found(advice: list[Advice], severity: str, subject: str, words: str = "") -> list[Advice]:
    return [a for a in advice if a.severity == severity and subject in a.subject and words in a.reason]


# Ranks


def test_a_group_that_would_lie_on_two_ranks_is_refused_and_names_the_largest_size_that_works(planned: Maker) -> None:
    plan = planned("awq-int4-g128")
    for engine in ("vllm", "sglang"):
        assert loads(advise(plan, engine, 4))
        (refusal,) = found(advise(plan, engine, 8), "refuses", "shared_expert.down_proj")
        assert "512 / 8 ranks = 64, no multiple of group_size 128; serve with tp 4 or fewer" in refusal.reason
        assert not found(advise(plan, engine, 8), "refuses", "o_proj"), "4096 / 8 inputs are four groups"


def test_expert_groups_of_compressed_tensors_must_be_whole_on_a_rank(planned: Maker) -> None:
    plan = planned(*linears("ct-packed", num_bits=4, group_size=128, also_exclude=["{path*}.shared_expert.{leaf*}.weight"]))
    for engine in ("vllm", "sglang"):
        assert not found(advise(plan, engine, 4), "refuses", EXPERTS)
        assert found(advise(plan, engine, 8), "refuses", EXPERTS, "64, no multiple of group_size 128; serve with tp 4")


def test_gptq_experts_fall_back_to_repeated_scales_in_vllm_and_are_refused_by_sglang(planned: Maker) -> None:
    plan = planned("gptq-int4-g128")
    advice = advise(plan, "vllm", 8)
    assert loads(advice)
    assert found(advice, "warns", EXPERTS, "falls back to moe_wna16 kernels, each scale repeated for groups of 64")
    assert not found(advise(plan, "vllm", 4), "warns", EXPERTS)
    assert found(advise(plan, "sglang", 8), "refuses", EXPERTS, "64, no multiple of group_size 128")
    small = planned("gptq-int4-g128", {"group_size": 64}, inner=64)
    assert found(advise(small, "vllm", 4), "refuses", EXPERTS, "no group_size of 32 or more")


def test_autoround_experts_must_suit_marlin_without_padding(planned: Maker) -> None:
    plan = planned("autoround-int4-g128", {"group_size": 32})
    assert not found(advise(plan, "vllm", 8), "warns", EXPERTS)
    assert found(advise(plan, "vllm", 16), "warns", EXPERTS, "falls back to moe_wna16 kernels")
    assert found(advise(plan, "sglang", 16), "refuses", EXPERTS, "does not suit Marlin")
    assert not found(advise(plan, "sglang", 8), "refuses", EXPERTS)


def test_in_proj_ba_is_replicated_for_gptq_and_cut_for_compressed_tensors(planned: Maker) -> None:
    packed = planned("ct-w4a16-g32", {"keep": []})
    assert not found(advise(packed, "vllm", 1), "warns", "in_proj_ba")
    assert found(
        advise(packed, "vllm", 2), "warns", "in_proj_ba", "32 x 2048 per rank is no multiple of Marlin's 64 x 128: padded"
    )
    assert found(advise(packed, "vllm", 2, version=(0, 21)), "refuses", "in_proj_ba", "0.21 does not pad")
    assert found(advise(packed, "sglang", 2), "refuses", "in_proj_ba", "does not pad")
    assert not found(advise(packed, "sglang", 1), "refuses", "in_proj_ba")
    replicated = planned(*linears("gptq", also_exclude=["{path*}.shared_expert.{leaf*}.weight"]))
    assert any(linear.leaf == "in_proj_ba" for linear in facts_of(replicated).linears)
    assert not found(advise(replicated, "vllm", 8, version=(0, 21)), "refuses", "in_proj_ba")


def test_marlin_also_takes_128_outputs_by_64_inputs_but_the_old_check_does_not(planned: Maker) -> None:
    plan = planned("ct-w4a16-g32")
    for engine in ("vllm", "sglang"):
        assert loads(advise(plan, engine, 8))
        assert not found(advise(plan, engine, 8), "warns", "shared_expert.down_proj"), "2048 x 64 is whole tiles"
    assert found(advise(plan, "vllm", 8, version=(0, 21)), "refuses", "shared_expert.down_proj")


def test_vision_fc2_of_4304_inputs_cuts_words_at_tp_8_and_suits_no_tile(planned: Maker) -> None:
    plan = planned("ct-w8a16")
    assert loads(advise(plan, "vllm", 4))
    assert found(advise(plan, "vllm", 1), "warns", "linear_fc1", "4304 x 1152")
    for engine in ("vllm", "sglang"):
        assert found(advise(plan, engine, 8), "refuses", "linear_fc2", "538 codes of 8 bits")
        assert not found(advise(plan, engine, 4), "refuses", "linear_fc2", "codes of 8 bits")
    assert found(advise(plan, "sglang", 1), "refuses", "linear_fc2", "1152 x 4304")
    assert loads(advise(planned("ct-w8a16", {"vision": False}), "sglang", 4))


def test_zero_points_in_words_must_fill_them_on_every_rank(planned: Maker) -> None:
    vision = {"also_exclude": [], "exclude": ["maybe:{path*}norm.weight", "maybe:{path*}gate.weight", "maybe:mtp.{rest*}"]}
    where = ["{path*}.visual.blocks.{n}.mlp.linear_fc1.weight"]
    plan = planned(*linears("ct-packed", num_bits=4, group_size=32, symmetric=False, where=where, split_experts=False, **vision))
    assert not found(advise(plan, "vllm", 2), "refuses", "linear_fc1")
    assert found(advise(plan, "vllm", 4), "refuses", "linear_fc1", "1076 outputs per rank: their zero points"), "1076 * 4 % 32"


def test_ranks_that_cannot_share_the_heads_are_refused(planned: Maker) -> None:
    plan = planned("quark-w8a8-int8")
    for engine in ("vllm", "sglang"):
        assert found(advise(plan, engine, 3), "refuses", "attention", "16 attention heads cannot be shared by 3 ranks")
    assert found(advise(plan, "vllm", 64), "refuses", "linear attention", "32 value heads")


def test_ranks_that_cannot_share_the_features_are_refused(planned: Maker) -> None:
    plan = planned("quark-w8a8-int8", shared=516, inner=516)
    # SGLang reads no Quark INT8 anyway, and says this besides.
    for engine in ("vllm", "sglang"):
        advice = advise(plan, engine, 8)
        assert found(advice, "refuses", "shared_expert.down_proj", "in_features 516 cannot be shared by 8 ranks")
        assert found(advice, "refuses", "shared_expert.gate_up_proj", "out_features 516 of gate_proj")
        assert found(advice, "refuses", EXPERTS, "516 features of each expert")
        assert not found(advice, "refuses", "qkv_proj"), "two key heads are repeated on eight ranks"


def test_a_linear_of_unknown_name_is_said_not_to_be_judged_when_cut(planned: Maker) -> None:
    tensors = headers() | {f"{LAYERS}.0.mlp.strange.weight": ["BF16", [256, 2048]]}
    plan = planned("quark-w8a8-int8", tensors=tensors)
    assert found(advise(plan, "vllm", 2), "warns", "strange", "not known how it is cut")
    assert not found(advise(plan, "vllm", 1), "warns", "strange")


# FP8 blocks


def test_fp8_blocks_may_not_lie_across_stacked_parts_or_ranks(planned: Maker) -> None:
    plan = planned("fp8-block", {"keep": []})
    for engine in ("vllm", "sglang"):
        assert found(advise(plan, engine, 1), "refuses", "in_proj_ba", "32 outputs of a part that others are stacked upon")
    kept = planned("fp8-block")
    for engine in ("vllm", "sglang"):
        assert loads(advise(kept, engine, 4))
        assert found(advise(kept, engine, 8), "refuses", "shared_expert.gate_up_proj", "64 outputs per rank cut a block")
        assert found(advise(kept, engine, 8), "refuses", "shared_expert.down_proj", "64 inputs per rank cut a block")
        assert not found(advise(kept, engine, 8), "refuses", "qkv"), "keys and values are repeated, queries are whole blocks"


def test_fp8_expert_blocks_are_refined_by_new_vllm_only_in_the_native_dialect(planned: Maker) -> None:
    keep = ["{path*}.shared_expert.{leaf*}.weight", "{path*}.in_proj_a.weight", "{path*}.in_proj_b.weight"]
    native = planned(*linears("hf-fp8", also_exclude=keep))
    assert loads(advise(native, "vllm", 8))
    assert found(advise(native, "vllm", 8), "warns", EXPERTS, "blocks of 64")
    assert found(advise(native, "vllm", 8, version=(0, 21)), "refuses", EXPERTS, "cuts blocks of 128")
    assert found(advise(native, "sglang", 8), "refuses", EXPERTS, "cuts blocks of 128")
    other = planned(*linears("ct-float", block=[128, 128], also_exclude=keep))
    assert found(advise(other, "vllm", 8), "refuses", EXPERTS, "cuts blocks of 128")
    assert not found(advise(other, "vllm", 4), "refuses", EXPERTS)


def test_fp8_experts_without_quantized_activations_are_refused_by_vllm(planned: Maker) -> None:
    assert found(
        advise(planned(*linears("ct-float", activations="none")), "vllm", 1), "refuses", "experts", "activations: dynamic"
    )
    assert loads(advise(planned(*linears("ct-float")), "vllm", 1))


# Kinds of integers


def test_zero_points_are_refused_where_only_symmetric_is_read(planned: Maker) -> None:
    packed = planned(*linears("ct-packed", num_bits=4, group_size=32, symmetric=False))
    assert loads(advise(packed, "vllm", 1))
    assert found(advise(packed, "vllm", 1, version=(0, 21)), "refuses", EXPERTS, "symmetric experts only")
    assert found(advise(packed, "sglang", 1), "refuses", EXPERTS, "only symmetric quantization is supported for MoE")
    assert found(advise(packed, "transformers", 1), "refuses", EXPERTS, "zero points")
    gptq = planned(*linears("gptq-v2", symmetric=False))
    assert found(advise(gptq, "vllm", 1), "refuses", EXPERTS, "symmetric with 4 or 8 bits only")
    assert found(advise(gptq, "sglang", 1), "refuses", EXPERTS, "plain GPTQ does not support MoE")
    assert loads(advise(planned(*linears("autoround-awq", symmetric=False)), "vllm", 1))
    # Not written here, but found on disk.
    facts = facts_of(planned(*linears("autoround")))
    asymmetric = replace(facts.linears[0].scheme, symmetric=False)
    of_others = replace(
        facts,
        linears=tuple(f._replace(scheme=asymmetric) for f in facts.linears),
        experts=tuple(f._replace(leaves={k: (*v[:2], asymmetric) for k, v in f.leaves.items()}) for f in facts.experts),
    )
    assert found(engine_named("vllm").judge(of_others, Target(engine="vllm")), "refuses", "o_proj", "read symmetric only")
    assert found(engine_named("sglang").judge(of_others, Target(engine="sglang")), "refuses", EXPERTS, "must suit Marlin")


def test_autoround_s_own_packing_is_read_by_neither(planned: Maker) -> None:
    plan = with_settings(planned("autoround-int4-g128"), packing_format="auto_round")
    for engine in ("vllm", "sglang"):
        assert not loads(advise(plan, engine, 1))


def test_widths_and_groups_that_kernels_lack_are_named(planned: Maker) -> None:
    five = planned(*linears("ct-packed", num_bits=5, group_size=-1))
    assert found(advise(five, "vllm", 1), "warns", EXPERTS, "5 bits: no kernel but humming's")
    assert found(advise(five, "sglang", 1), "refuses", EXPERTS, "read with 4 or 8")
    eight = planned(*linears("ct-packed", num_bits=8, group_size=128, symmetric=False))
    assert found(advise(eight, "vllm", 1), "warns", "o_proj", "Machete")
    small = planned(*linears("gptq", group_size=16))
    assert found(advise(small, "vllm", 1), "refuses", "o_proj", "group_size 16; Marlin takes -1, 32, 64, 128")
    assert found(
        advise(planned(*linears("ct-packed", num_bits=4, group_size=256)), "vllm", 1), "warns", "o_proj", "none of Marlin's"
    )
    assert loads(advise(planned("ct-w4a16-g32"), "vllm", 1))


def test_hidden_sizes_that_suit_no_marlin_tile_need_groups(planned: Maker) -> None:
    channel = planned(*linears("ct-packed", num_bits=8, group_size=-1), hidden=1088)
    assert found(advise(channel, "vllm", 1), "refuses", EXPERTS, "hidden size 1088: no Marlin tile")
    grouped = planned(*linears("ct-packed", num_bits=4, group_size=32), hidden=1088)
    assert found(advise(grouped, "vllm", 1), "warns", EXPERTS, "Triton's kernel")
    assert found(
        advise(planned(*linears("gptq", group_size=-1), hidden=1088), "vllm", 1), "refuses", EXPERTS, "no channel scales"
    )


def test_quark_integers_are_unknown_to_sglang_and_channel_int4_to_vllm(planned: Maker) -> None:
    assert not loads(advise(planned("quark-w8a8-int8"), "sglang", 1))
    assert loads(advise(planned("quark-w8a8-int8"), "vllm", 1))
    assert not loads(advise(planned(*linears("quark-int4", group_size=32)), "sglang", 1))
    assert loads(advise(planned(*linears("quark-int4", group_size=32)), "vllm", 1))
    assert found(advise(planned(*linears("quark-int4", group_size=-1)), "vllm", 1), "refuses", EXPERTS, "in groups only")


def test_group_activation_ordering_is_refused_by_vllm(planned: Maker) -> None:
    plan = planned("gptq-int4-g128")
    assert loads(advise(plan, "vllm", 1))
    assert found(advise(with_settings(plan, desc_act=True), "vllm", 1), "refuses", "checkpoint", "desc_act")
    packed = planned("ct-w4a16-g32")
    groups = json.loads(packed.files.contents["config.json"])["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["actorder"] = "group"
    assert found(advise(with_settings(packed, config_groups=groups), "vllm", 1), "refuses", "checkpoint", "actorder")


# Experts, routers and the MTP head


def test_stacked_experts_left_quantized_are_refused_by_all(planned: Maker) -> None:
    tensors = headers()
    for leaf in ("gate_up_proj", "down_proj"):
        tensors[f"{LAYERS}.0.mlp.experts.{leaf}"][0] = "F8_E4M3"
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    plan = planned(None, tensors=tensors, config=CONFIG | {"quantization_config": settings})
    for engine in ENGINES:
        assert found(advise(plan, engine, 1), "refuses", f"{LAYERS}.0.mlp.experts", "stacked in one tensor and quantized")


def test_stacked_and_split_experts_in_one_model_confuse_sglang(planned: Maker) -> None:
    plan = planned(None, split=(1,))
    assert found(advise(plan, "sglang", 1), "silent-garbage", f"{LAYERS}.0.mlp.experts", "the loader skips the others")
    assert loads(advise(plan, "vllm", 1))
    assert found(advise(plan, "vllm", 1, version=(0, 21)), "silent-garbage", "experts")
    for one_way in ((), (0, 1)):
        assert loads(advise(planned(None, split=one_way), "sglang", 1)), "a stacked MTP head is another model's"


def test_experts_of_several_kinds_in_one_layer_are_refused(planned: Maker) -> None:
    facts = facts_of(planned("quark-w8a8-int8"))
    (experts,) = facts.experts
    assert experts.mixed is None
    mixed = replace(facts, experts=(experts._replace(mixed="several schemes"),))
    for engine in ENGINES:
        advice = engine_named(engine).judge(mixed, Target(engine=engine))
        assert found(advice, "refuses", EXPERTS, "several schemes within a layer")


def test_layers_with_unquantized_parts_of_experts_are_noticed(planned: Maker) -> None:
    from tensorsurgeon.engines.facts import _mixed, _Stored

    eight, four = Scheme(), Scheme(num_bits=4)
    whole = [_Stored("x.experts", leaf, (8, 8), eight, 4) for leaf in ("gate_proj", "up_proj", "down_proj")]
    assert _mixed(whole) is None
    assert _mixed(whole[:2]) == "gate_proj and up_proj quantized, down_proj not"
    assert _mixed([*whole[:2], whole[2]._replace(scheme=four)]) == "several schemes"
    assert _mixed([*whole[:2], whole[2]._replace(number=3)]) == "some experts quantized, others not"
    assert _mixed([*whole, whole[0]._replace(shape=(8, 16))]) == "several shapes"


def test_quantized_routers_are_refused(planned: Maker) -> None:
    everything = ["role:linear", "role:router", "role:shared-expert-gate"]
    plan = planned(*linears("quark-int8", where=everything, exclude=[]))
    for engine in ("vllm", "sglang"):
        assert found(advise(plan, engine, 1), "refuses", f"{LAYERS}.*.mlp.gate", "leave it BF16")
        assert found(advise(plan, engine, 1), "refuses", "shared_expert_gate")
    assert not found(advise(planned("quark-w8a8-int8"), "vllm", 1), "refuses", "gate")


@pytest.mark.parametrize(
    ("transform", "broken", "words"),
    [
        ("gptq-int4-g128", {"dynamic": {"-:lm_head": {}}}, "dynamic has no rule"),
        ("ct-w4a16-g32", {"ignore": ["lm_head", "mtp.fc"]}, "ignore has no expression"),
        ("quark-w8a8-int8", {"exclude": ["lm_head", "mtp.fc"]}, "exclude has no expression"),
        ("awq-int4-g128", {"modules_to_not_convert": ["lm_head"]}, "modules_to_not_convert has no 'mtp'"),
        ("fp8-block", {"modules_to_not_convert": ["lm_head"]}, "modules_to_not_convert lacks mtp."),
        ("autoround-int4-g128", {"block_name_to_quantize": None}, "block_name_to_quantize does not leave it out"),
    ],
)
def test_an_mtp_head_that_the_config_does_not_keep_out_is_warned_of(
    planned: Maker, transform: str, broken: dict[str, Any], words: str
) -> None:
    plan = planned(transform)
    assert not found(advise(plan, "vllm", 1), "warns", "mtp")
    assert found(advise(with_settings(plan, **broken), "vllm", 1), "warns", "mtp", words)


def test_bf16_experts_under_gptq_are_skipped_by_sglang(planned: Maker) -> None:
    assert found(advise(planned("gptq-int4-g128"), "sglang", 1), "warns", "mtp", "drafts fail")
    attention = planned(*linears("gptq", where=["{path*}.layers.{n}.self_attn.{leaf}.weight"], split_experts=False))
    assert found(advise(attention, "sglang", 1), "silent-garbage", "experts", "ignore the rules in dynamic")


def test_a_bf16_mtp_head_beside_quark_fp8_must_be_named_plainly_for_sglang(planned: Maker) -> None:
    plan = planned(*linears("quark-fp8"))
    assert found(advise(plan, "sglang", 1), "warns", "mtp", "no plain name")
    both = json.loads(plan.files.contents["config.json"])["quantization_config"]["exclude"] + ["mtp.fc"]
    assert not found(advise(with_settings(plan, exclude=both), "sglang", 1), "warns", "mtp")


def test_awq_exceptions_that_are_part_of_quantized_names_are_found_also_in_fused_ones(planned: Maker) -> None:
    plan = planned("awq-int4-g128")
    assert not found(advise(plan, "vllm", 1), "refuses", "")
    own = with_settings(plan, modules_to_not_convert=["lm_head", "mtp", "visual", "self_attn.o"])
    assert found(advise(own, "vllm", 1), "refuses", "self_attn.o_proj", "'self_attn.o'")
    fused = with_settings(plan, modules_to_not_convert=["lm_head", "mtp", "visual", "shared_expert.gate_u"])
    assert found(advise(fused, "vllm", 1), "refuses", "shared_expert.gate_up_proj")


# transformers


@pytest.mark.parametrize(
    ("transform", "severity", "source"),
    [
        (("quark-w8a8-int8", {}), "silent-garbage", "tested"),
        (("nvfp4a16", {}), "silent-garbage", "tested"),
        (("gptq-int4-g128", {}), "silent-garbage", "read"),
        (("awq-int4-g128", {}), "silent-garbage", "read"),
        (("ct-w8a8-int8", {}), "refuses", "tested"),
        (linears("ct-float", block=[128, 128], also_exclude=IN_PROJ_BA), "refuses", "tested"),
        (linears("quark-int4"), "refuses", "tested"),
        (("ct-w4a16-g32", {}), "loads", "tested"),
        (("ct-w8a16", {}), "loads", "tested"),
        (("autoround-int4-g128", {}), "loads", "tested"),
        (("fp8-block", {}), "loads", "tested"),
        (linears("ct-mxfp4"), "loads", "tested"),
        (linears("ct-float"), "loads", "tested"),
        (linears("quark-fp8"), "warns", "read"),
    ],
)  # fmt: skip
def test_transformers_on_experts_stored_one_by_one(
    planned: Maker, transform: tuple[str, dict[str, Any]], severity: str, source: str
) -> None:
    advice = advise(planned(*transform), "transformers", 1)
    assert advice[0].severity == severity or (severity == "loads" and advice[-1].severity == "loads")
    judged = [a for a in advice if a.severity == severity and "needs" not in a.reason]
    assert [a.source for a in judged] == [source]
    assert loads(advice) == (severity in ("loads", "warns"))


def test_int8_of_compressed_tensors_loads_in_transformers_while_experts_stay_stacked(planned: Maker) -> None:
    where = ["{path*}.layers.{n}.self_attn.{leaf}.weight"]
    stacked = planned(*linears("ct-int", where=where, split_experts=False))
    assert loads(advise(stacked, "transformers", 1))
    split = planned(*linears("ct-int", where=where, split_experts=False), split=(0, 1))
    assert found(advise(split, "transformers", 1), "refuses", "experts", "quantized or not")


def test_transformers_needs_the_publishers_library_and_was_not_looked_at_for_several_ranks(planned: Maker) -> None:
    plan = planned("ct-w4a16-g32")
    assert found(advise(plan, "transformers", 1), "warns", "checkpoint", "needs compressed-tensors")
    assert not found(advise(planned(None), "transformers", 1), "warns", "checkpoint")
    assert found(advise(plan, "transformers", 2), "warns", "checkpoint", "was not looked at")
    assert not found(advise(plan, "transformers", 1), "warns", "checkpoint", "was not looked at")


# CPUs


@pytest.mark.parametrize(
    ("transform", "serves"),
    [
        ("quark-w8a8-int8", True),
        ("ct-w8a8-int8", True),
        ("ct-w4a16-g32", True),
        ("gptq-int4-g128", True),
        ("ct-w8a16", False),
        ("autoround-int4-g128", False),
        ("awq-int4-g128", False),
        ("fp8-block", False),
        ("nvfp4a16", False),
    ],
)
def test_vllm_on_a_cpu_is_judged_as_it_was_seen_to_serve(planned: Maker, transform: str, serves: bool) -> None:
    advice = advise(planned(transform), "vllm", 1, device="cpu")
    assert loads(advice) == serves
    assert advice[0].source == "tested"
    if not serves:
        assert loads(advise(planned(transform), "vllm", 1)), "a GPU has the kernel"


# Answers, requirements, cost


def test_what_cannot_be_read_is_not_judged_and_meets_no_requirement(planned: Maker) -> None:
    plan = planned(None, config=CONFIG | {"quantization_config": {"quant_method": "bitsandbytes"}})
    for engine in ENGINES:
        advice = advise(plan, engine, 1)
        assert [a.severity for a in advice] == ["warns"]
        assert "bitsandbytes" in advice[0].reason
    assert "vllm 0.32: not judged" in advice_as_text(advise_all(plan))
    with pytest.raises(EngineError, match="could not be read"):
        check_requirements(plan, ["vllm"])


def test_an_unquantized_checkpoint_loads_everywhere(planned: Maker) -> None:
    plan = planned("split-experts")
    for one in advise_all(plan):
        assert one.loads_at_tp == one.asked_tp
        assert {a.reason for a in one.advice if a.severity == "loads"} == {"unquantized"}


def test_a_quantized_checkpoint_that_is_only_copied_is_judged_by_its_config(planned: Maker, tmp_path: Path) -> None:
    first = planned("awq-int4-g128")
    tensors = {name: [spec.dtype.name, list(spec.shape)] for name, spec in first.specs.items()}
    config = json.loads(first.files.contents["config.json"])
    again = planned(None, tensors=tensors, config=config)
    assert not again.quantized
    for tp in (1, 8):
        assert advise(again, "vllm", tp) == advise(first, "vllm", tp)


def test_a_verdict_says_what_stands_behind_it(planned: Maker) -> None:
    def sources(plan: Plan, tp: int = 1) -> dict[str, str]:
        return {engine: found(advise(plan, engine, tp), "loads", "checkpoint")[0].source for engine in ENGINES}

    served = planned("ct-w4a16-g32")
    assert sources(served) == {"vllm": "tested", "sglang": "read", "transformers": "tested"}
    assert sources(served, 2)["vllm"] == "read"
    asked = planned("ct-w4a16-g32", config=CONFIG | {"architectures": ["AfmoeForCausalLM"]})
    assert sources(asked) == {"vllm": "read", "sglang": "not known", "transformers": "not known"}
    strange = {**CONFIG, "architectures": ["NextYearForCausalLM"], "model_type": "next_year"}
    nobody = planned("ct-w4a16-g32", config=strange)
    assert set(sources(nobody).values()) == {"not known"}
    assert "vllm 0.32: no rule speaks against it at tp 1, 2, 4, 8 [not known]" in advice_as_text(advise_all(nobody))
    check_requirements(nobody, ["vllm:tp=2"])


@pytest.mark.parametrize(
    ("architecture", "model_type", "reason"),
    [
        ("OlmoeForCausalLM", "olmoe", None),  # looks for gate_proj, up_proj, down_proj
        ("MixtralForCausalLM", "mixtral", None),  # for w1, w2, w3, and renames these
        ("MiniMaxM2ForCausalLM", "minimax_m2", "down_proj, gate_proj, up_proj one by one; its loader looks for w1, w2, w3"),
        ("GptOssForCausalLM", "gpt_oss", "takes the experts of a layer in one tensor"),
    ],
)
def test_experts_that_vllm_does_not_look_for_are_garbage(
    planned: Maker, architecture: str, model_type: str, reason: str | None
) -> None:
    config = {**CONFIG, "architectures": [architecture], "model_type": model_type, "text_config": {}}
    tensors = {name: spec for name, spec in headers(split=(0, 1)).items() if not name.startswith("mtp.")}
    plan = planned("ct-w4a16-g32", config=config, tensors=tensors)
    wrong = found(advise(plan, "vllm", 1), "silent-garbage", "experts")
    assert [reason in one.reason for one in wrong] == ([] if reason is None else [True])
    assert bool(found(advise(plan, "transformers", 1), "silent-garbage", "experts", "gathers none")) == (model_type == "gpt_oss")
    if reason is not None:
        with pytest.raises(EngineError):
            check_requirements(plan, ["vllm"])


def test_every_layout_that_is_said_to_be_served_is_one() -> None:
    table = yaml.safe_load(resources.files("tensorsurgeon.engines").joinpath("served.yaml").read_text())
    assert table.keys() == set(ENGINES)
    layouts = {part for one in table.values() for names in one["served"].values() for name in names for part in name.split("+")}
    assert layouts - {""} <= {name.rpartition("-v2")[0] or name for name in FORMATS}


def test_each_part_of_a_mixed_checkpoint_is_judged(planned: Maker) -> None:
    plan = planned("mixed", {"experts": "nvfp4", "attention": "fp8", "mlp": "keep"})
    (good,) = found(advise(plan, "vllm", 1), "loads", "checkpoint")
    assert "ct-nvfp4" in good.reason
    assert "ct-float" in good.reason
    assert good.source == "read"
    assert found(advise(plan, "transformers", 1), "silent-garbage", "experts", "global scales")
    narrow = planned("mixed", {"experts": "w4a16", "attention": "fp8", "mlp": "keep"}, inner=96)
    assert found(advise(narrow, "vllm", 1), "loads", "checkpoint")
    assert found(advise(narrow, "vllm", 8), "refuses", "experts")
    assert not found(advise(narrow, "vllm", 8), "loads", "checkpoint")
    assert "not judged" not in advice_as_text(advise_all(plan))


def test_experts_in_several_layouts_are_refused(planned: Maker) -> None:
    experts = {"where": ["{path*}.experts.{e}.{leaf}.weight"]}
    one = planned(*linears("ct-int", **experts))
    settings = json.loads(one.files.contents["config.json"])["quantization_config"]
    assert found(advise(one, "vllm", 1), "loads", "checkpoint")
    group = settings["config_groups"]["group_0"]
    eight = {**group, "format": "pack-quantized", "input_activations": None, "targets": ["re:.*down_proj$"]}
    config = json.loads(one.files.contents["config.json"])
    config["quantization_config"] = {
        **settings, "format": "mixed-precision",
        "config_groups": {"group_0": {**group, "format": "int-quantized", "targets": ["re:.*(gate|up)_proj$"]}, "group_1": eight},
    }  # fmt: skip
    tensors = {}
    for name, spec in one.specs.items():
        if name.endswith("experts.0.down_proj.weight") or (".experts." in name and name.endswith("down_proj.weight")):
            tensors[f"{name}_packed"] = ["I32", [spec.shape[0], spec.shape[1] // 4]]
            tensors[f"{name}_shape"] = ["I64", [2]]
        else:
            tensors[name] = [spec.dtype.name, list(spec.shape)]
    both = planned(None, tensors=tensors, config=config)
    assert found(advise(both, "vllm", 1), "refuses", "experts", "in several layouts")


def test_requirements_list_every_reason_and_name_the_requirement(planned: Maker) -> None:
    plan = planned("nvfp4a16")
    check_requirements(plan, [])
    check_requirements(plan, ["vllm:tp=4", "sglang"])
    with pytest.raises(EngineError) as error:
        check_requirements(plan, ["vllm:tp=3,device=cpu", "transformers", "vllm"])
    lines = str(error.value).splitlines()
    assert error.value.exit_code == 37
    assert any(line.startswith("  vllm:tp=3,device=cpu: refuses: attention:") for line in lines)
    assert any(line.startswith("  transformers: silent-garbage:") and line.endswith("[tested]") for line in lines)
    assert not any(line.startswith("  vllm: ") for line in lines)


def test_requirements_have_a_syntax() -> None:
    assert parse_requirement("vllm") == Target(engine="vllm")
    assert parse_requirement("vllm:tp=4,version=0.21,device=cpu") == Target(engine="vllm", tp=4, version=(0, 21), device="cpu")
    for wrong, words in {
        "vlm": "did you mean 'vllm'", "vllm:tp": "none of its keys", "vllm:tp=0": "a positive", "vllm:tp=2.5": "a positive",
        "vllm:version=new": "as 0.32", "sglang:device=cpu": "device must be gpu", "vllm:ranks=4": "none of its keys",
    }.items():  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            parse_requirement(wrong)


def test_the_command_line_shows_advice_and_stops_at_requirements(planned: Maker, tmp_path: Path) -> None:
    source = str(planned(None).source.root)
    shown = CliRunner().invoke(main, ["plan", "awq-int4-g128", source])
    assert "vllm 0.32: loads at tp 1, 2, 4 [read]" in shown.output
    assert "refuses at tp 8: " in shown.output
    data = json.loads(CliRunner().invoke(main, ["plan", "awq-int4-g128", source, "--json"]).output)
    assert {one["engine"]: one["loads_at_tp"] for one in data["engines"]}["vllm"] == [1, 2, 4]
    for command in (["plan", "awq-int4-g128", source], ["apply", "awq-int4-g128", source, str(tmp_path / "out")]):
        stopped = CliRunner().invoke(main, [*command, "--require", "vllm:tp=4", "--require", "vllm:tp=8"])
        assert stopped.exit_code == 37
        assert "vllm:tp=8: refuses: " in stopped.output
        assert "vllm:tp=4: " not in stopped.output
    assert not (tmp_path / "out").exists()


def test_the_same_finding_at_several_sizes_is_one_line(planned: Maker) -> None:
    everything = advise_all(planned("ct-w8a16"))
    lines = advice_as_text(everything).splitlines()
    assert sum("linear_fc1" in line and line.strip().startswith("warns") for line in lines) == 1
    (vllm,) = [one for one in advice_as_data(everything) if one["engine"] == "vllm"]
    assert {a["tp"] for a in vllm["advice"] if "linear_fc1" in a["subject"]} == {1, 2, 4, 8}


def test_the_real_model_has_few_forms_and_judging_them_is_quick(tmp_path: Path) -> None:
    config = (SKELETON / "qwen3.6-35b-a3b.config.json").read_bytes()
    write_skeleton(tmp_path / "m", read_skeleton(SKELETON / "qwen3.6-35b-a3b.tensors.json"), config, shards=26)
    plan = make_plan(load_transform("gptq-int4-g128"), open_checkpoint(tmp_path / "m"))
    assert len(plan.quantized) == 30720
    (experts,) = facts_of(plan).forms
    assert isinstance(experts, Experts)
    assert (experts.layers, experts.hidden, experts.intermediate) == (40, 2048, 512)
    spent = []
    for _ in range(3):
        began = time.process_time()
        advice_as_text(advise_all(plan))
        spent.append(time.process_time() - began)
    assert min(spent) < 0.15
    int8 = make_plan(load_transform("quark-w8a8-int8"), open_checkpoint(tmp_path / "m"))
    assert (
        sum(len(f.leaves) * f.layers * 256 if isinstance(f, Experts) else len(f.parts) * f.number for f in facts_of(int8).forms)
        == 31030
    )
    assert len(facts_of(int8).forms) < 12


def test_advice_needs_no_torch() -> None:
    code = (
        "import sys, tensorsurgeon.engines.advice as a, tensorsurgeon.engines.registry as r\n"
        "[r.engine_named(n) for n in r.ENGINES]\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPOSITORY).returncode == 0


def test_parts_of_a_linear_are_shared_as_heads_demand() -> None:
    heads = Heads(attention=16, key_values=2, linear_values_count=32, linear_keys=2048, linear_values=4096)
    qkv = Linear("x.qkv_proj", "qkv_proj", (("q_proj", 8192), ("k_proj", 512), ("v_proj", 512)), 2048, Scheme(), 1, False)
    assert qkv.outputs(2, heads) == (4096, 256, 256)
    assert qkv.outputs(8, heads) == (1024, 256, 256), "a key head is never cut"
    qkvz = Linear("x.in_proj_qkvz", "in_proj_qkvz", (("in_proj_qkv", 8192), ("in_proj_z", 4096)), 2048, Scheme(), 1, False)
    assert qkvz.outputs(4, heads) == (512, 512, 1024, 1024)
    out = Linear("x.out_proj", "out_proj", (("out_proj", 2048),), 4096, Scheme(), 1, False)
    assert (out.inputs(4), out.outputs(4, heads)) == (1024, (2048,))


# The engines themselves


@pytest.mark.engine
@pytest.mark.parametrize(("transform", "library"), [("fp8-block", "accelerate"), ("gptq-int4-g128", "optimum")])
def test_transformers_wants_the_library_that_the_advice_names(tmp_path: Path, transform: str, library: str) -> None:
    from importlib.util import find_spec

    if find_spec(library) is not None:
        pytest.skip(f"{library} is installed here, so that nothing is missing")
    apply(load_transform(transform), FIXTURE, tmp_path / "out")
    plan = make_plan(load_transform(transform), open_checkpoint(FIXTURE))
    assert found(advise(plan, "transformers", 1), "warns", "checkpoint", library)
    from transformers import AutoModelForImageTextToText

    with pytest.raises(ImportError, match=library):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


ASK_VLLM = """
import json, sys
from types import SimpleNamespace
from vllm.model_executor.layers.fused_moe.oracle.fp8 import refine_fp8_moe_block_shape
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.inc.inc import INCConfig
from vllm.model_executor.layers.quantization.utils import marlin_utils as marlin
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

def gptq(bits, sym, desc_act=False):
    try:
        AutoGPTQConfig(bits, 128, desc_act, sym, False, {}, {})
        return True
    except ValueError:
        return False

def autoround(packing):
    try:
        INCConfig(4, 128, True, packing)
        return True
    except ValueError:
        return False

def refined(inner):
    config = SimpleNamespace(intermediate_size_per_partition=inner, tp_size=8, hidden_dim=2048)
    return refine_fp8_moe_block_shape(config, [128, 128])

json.dump({
    "padded": [marlin.marlin_padded_nk(n, k) != (n, k) for n, k in json.loads(sys.argv[1])],
    "groups": list(marlin.MARLIN_SUPPORTED_GROUP_SIZES),
    "gptq": {f"{bits} {sym}": gptq(bits, sym) for bits in (2, 3, 4, 8) for sym in (True, False)},
    "desc_act": gptq(4, True, True),
    "packings": {p: autoround(p) for p in ("auto_round:auto_gptq", "auto_round:auto_awq", "auto_round", "auto_round:gptqmodel")},
    "refined": {str(n): refined(n) for n in (16, 64, 128)},
    "substring": is_layer_skipped(
        "x.mlp.gate_up_proj", ["mlp.gate"], {"gate_up_proj": ["gate_proj", "up_proj"]}, match_mode="substring"
    ),
}, open(sys.argv[2], "w"))
"""


@pytest.mark.engine
@pytest.mark.skipif(not VLLM.exists(), reason="no vLLM here; tests/engines/vllm_env.sh installs it")
def test_rules_agree_with_the_installed_vllm(tmp_path: Path, planned: Maker) -> None:
    shapes = [(64, 128), (128, 64), (64, 64), (32, 2048), (4304, 1152), (1152, 4304), (2048, 64), (2048, 576), (864, 1152)]
    answer = tmp_path / "answer.json"
    subprocess.run([str(VLLM), "-c", ASK_VLLM, json.dumps(shapes), str(answer)], check=True, capture_output=True)
    said = json.loads(answer.read_text())
    from tensorsurgeon.engines import parallel, vllm

    facts = facts_of(planned("ct-w4a16-g32"))
    for (n, k), padded in zip(shapes, said["padded"], strict=True):
        linear = Linear("x.gate_proj", "gate_proj", (("gate_proj", n),), k, Scheme(num_bits=4, group_size=-1), 1, False)
        findings = list(vllm.marlin_tiles(replace(facts, linears=(linear,)), Target(engine="vllm")))
        assert bool(findings) == padded, (n, k)
    assert tuple(said["groups"]) == parallel.MARLIN_GROUPS
    assert said["gptq"] == {f"{b} {s}": b in (4, 8) and s for b in (2, 3, 4, 8) for s in (True, False)}
    assert not said["desc_act"]
    assert [p for p, taken in said["packings"].items() if taken] == list(vllm.PACKINGS)
    assert said["refined"] == {"16": None, "64": [64, 64], "128": None}
    assert said["substring"]

"""A value of the config that no reader takes, or that two files disagree about."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verifying.planting import CONFIG, E1, Case, Cases, check_found
from tests.verifying.subjects import Spoilt

CASES = Cases()
planted = CASES.planted


@planted("quark-int4", "pack-method", f"{CONFIG}.export.pack_method", "'reordered'", "did you mean 'reorder'")
def a_misspelt_pack_method(s: Spoilt) -> None:
    s.quantization["export"]["pack_method"] = "reordered"


@planted("quark-int8", "config", f"{CONFIG}.export", "pack_method", "kv_cache_group")
def quark_without_export(s: Spoilt) -> None:
    del s.quantization["export"]


@planted("quark-int8", "config", f"{CONFIG}.exclude", "'*mlp.gate' is a glob", "vLLM")
def a_glob_that_vllm_does_not_read(s: Spoilt) -> None:
    s.quantization["exclude"].append("*mlp.gate")


@planted("ct-packed", "config", f"{CONFIG}.quantization_status", "'frozen'", "'compressed'")
def a_status_under_which_nothing_is_unpacked(s: Spoilt) -> None:
    s.quantization["quantization_status"] = "frozen"


@planted("ct-packed", "config", f"{CONFIG}.config_groups.group_0.weights.zero_bits", "unknown key", "readers refuse")
def a_key_that_readers_refuse(s: Spoilt) -> None:
    s.ct_group["weights"]["zero_bits"] = 4


@planted("ct-packed", "config", f"{CONFIG}.config_groups.group_0.format", "'packed-quantized'", "did you mean 'pack-quantized'")
def a_misspelt_layout(s: Spoilt) -> None:
    s.ct_group["format"] = "packed-quantized"


@planted("ct-int", "config", f"{CONFIG}.config_groups.group_0.weights.group_size", "strategy channel has no groups", "128")
def a_group_size_with_channel_scales(s: Spoilt) -> None:
    s.ct_group["weights"]["group_size"] = 128


@planted("ct-packed", "config", f"{CONFIG}.config_groups.group_0.weights.actorder", "'group'")
def an_activation_order_that_no_reader_takes(s: Spoilt) -> None:
    s.ct_group["weights"]["actorder"] = "group"


@planted("autoround", "config", f"{CONFIG}.packing_format", "'auto_round:auto_gtpq'", "did you mean 'auto_round:auto_gptq'")
def a_misspelt_packing_format(s: Spoilt) -> None:
    s.quantization["packing_format"] = "auto_round:auto_gtpq"


@planted("ct-int", "config", f"{CONFIG}.ignore", "expected a list of strings", "'lm_head'")
def an_ignore_list_that_is_no_list(s: Spoilt) -> None:
    s.quantization["ignore"] = "lm_head"


@planted("ct-int", "config", f"{CONFIG}.config_groups.group_0.targets", "expected a list of strings", "'Linear'")
def targets_that_are_no_list(s: Spoilt) -> None:
    s.ct_group["targets"] = "Linear"


@planted("ct-int", "config", f"{CONFIG}.ignore", "'re:(' is no regular expression")
def an_expression_that_does_not_compile(s: Spoilt) -> None:
    s.quantization["ignore"].append("re:(")


@planted("quark-int8", "config", f"{CONFIG}.exclude", "'re:(' is no regular expression")
def a_quark_expression_that_does_not_compile(s: Spoilt) -> None:
    s.quantization["exclude"].append("re:(")


@planted("gptq", "config", f"{CONFIG}.dynamic", "expected a mapping", "['-:.*gate.*']")
def dynamic_rules_that_are_a_list(s: Spoilt) -> None:
    s.quantization["dynamic"] = ["-:.*gate.*"]


@planted("gptq", "config", f"{CONFIG}.dynamic", "'-:(' is no regular expression")
def a_dynamic_rule_that_does_not_compile(s: Spoilt) -> None:
    s.quantization["dynamic"] = {"-:(": {}}


@planted("autoround", "config", f"{CONFIG}.extra_config", "'[x' is no regular expression")
def an_extra_config_key_that_does_not_compile(s: Spoilt) -> None:
    s.quantization.setdefault("extra_config", {})["[x"] = {"bits": 16}


@planted("gptq", "config", f"{CONFIG}.checkpoint_format", "'gptq_v3'", "did you mean")
def a_checkpoint_format_that_is_not_known(s: Spoilt) -> None:
    s.quantization["checkpoint_format"] = "gptq_v3"


@planted("gptq", "config", f"{CONFIG}.group_size", "found 0")
def a_group_size_of_nothing(s: Spoilt) -> None:
    s.quantization["group_size"] = 0


@planted("awq", "config", f"{CONFIG}.version", "'gemv'", "'gemm'")
def an_awq_version_that_is_packed_otherwise(s: Spoilt) -> None:
    s.quantization["version"] = "gemv"


@planted("hf-fp8", "config", f"{CONFIG}.fmt", "'e5m2'", "'e4m3'")
def an_fp8_of_another_kind(s: Spoilt) -> None:
    s.quantization["fmt"] = "e5m2"


@planted("quark-int8", "config", f"{CONFIG}.layer_type_quant_config", "is missing")
def quark_without_layer_types(s: Spoilt) -> None:
    del s.quantization["layer_type_quant_config"]


@planted("quark-int8", "config", f"{CONFIG}.global_quant_config.weight.dtype", "'int7'", "int8")
def a_quark_dtype_that_is_not_known(s: Spoilt) -> None:
    s.quantization["global_quant_config"]["weight"]["dtype"] = "int7"


@planted("quark-int8", "config", f"{CONFIG}.global_quant_config.weight.qscheme", "'per_block'")
def a_quark_scheme_that_is_not_known(s: Spoilt) -> None:
    s.quantization["global_quant_config"]["weight"]["qscheme"] = "per_block"


@planted("quark-int8", "config", f"{CONFIG}.global_quant_config.weight.is_dynamic", "not in the file")
def weights_that_are_quantized_while_running(s: Spoilt) -> None:
    s.quantization["global_quant_config"]["weight"]["is_dynamic"] = True


@planted("quark-int8", "config", f"{CONFIG}.global_quant_config.weight", "expected a mapping", "None")
def quark_without_a_weight_scheme(s: Spoilt) -> None:
    s.quantization["global_quant_config"]["weight"] = None


@planted("quark-int4", "config", f"{CONFIG}.global_quant_config.weight.group_size", "positive group_size", "None")
def quark_groups_without_a_size(s: Spoilt) -> None:
    s.quantization["global_quant_config"]["weight"]["group_size"] = None


@planted("ct-int", "config", f"{CONFIG}.config_groups", "expected groups of targets", "{}")
def a_config_without_groups(s: Spoilt) -> None:
    s.quantization["config_groups"] = {}


@planted(
    "ct-packed", "config", f"{CONFIG}.config_groups.group_0.weights", "pack-quantized holds int of 2 to 8 bits", "float of 4 bits"
)
def a_type_that_the_layout_does_not_hold(s: Spoilt) -> None:
    s.ct_group["weights"]["type"] = "float"


@planted("ct-packed", "config", f"{CONFIG}.config_groups.group_0.weights.strategy", "'groups'", "did you mean 'group'")
def a_misspelt_strategy(s: Spoilt) -> None:
    s.ct_group["weights"]["strategy"] = "groups"


@planted("ct-packed", "config", f"{CONFIG}.config_groups.group_0.weights.group_size", "needs a positive group_size", "None")
def groups_without_a_size(s: Spoilt) -> None:
    s.ct_group["weights"]["group_size"] = None


@planted("ct-nvfp4", "config", f"{CONFIG}.config_groups.group_0.weights.group_size", "has groups of 16", "32")
def nvfp4_groups_of_another_size(s: Spoilt) -> None:
    s.ct_group["weights"]["group_size"] = 32


@planted("ct-float", "config", f"{CONFIG}.config_groups.group_0.weights.block_structure", "two sizes", "None")
def blocks_without_a_size(s: Spoilt) -> None:
    s.ct_group["weights"]["strategy"] = "block"


@planted("gptq", "config", f"{CONFIG}.bits", "found 5")
def bits_that_no_reader_takes(s: Spoilt) -> None:
    s.quantization["bits"] = 5


@planted("awq", "config", f"{CONFIG}.zero_point", "drop the offset of 8")
def awq_without_zero_points(s: Spoilt) -> None:
    s.quantization["zero_point"] = False


@planted("hf-fp8", "config", f"{CONFIG}.weight_block_size", "[128, 128]", "[128]")
def fp8_with_half_a_block_size(s: Spoilt) -> None:
    s.quantization["weight_block_size"] = [128]


@planted("hf-fp8", "missing-tensor", f"{E1}.weight_scale", "fp8 8 bits, per tensor")
def fp8_without_a_block_size(s: Spoilt) -> None:
    del s.quantization["weight_block_size"]


@planted("ct-int", "config", f"{CONFIG}.quant_method", "'compressed_tensors'", "did you mean 'compressed-tensors'")
def a_misspelt_method(s: Spoilt) -> None:
    s.quantization["quant_method"] = "compressed_tensors"


@planted("gptq", "config-copy", "quantize_config.json", "differs", "group_size (32 here, 64 there)", copies=False)
def two_configs_that_disagree(s: Spoilt) -> None:
    s.quantization["group_size"] = 64


@planted("autoround", "config-copy", "quantization_config.json", "differs", "bits", copies=False)
def two_autoround_configs_that_disagree(s: Spoilt) -> None:
    s.quantization["bits"] = 8


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_planted_fault_is_found_and_named(case: Case, tmp_path: Path) -> None:
    check_found(case, tmp_path / "spoilt")

"""What config.json says is quantized is not what the tensors are, or its lists name nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verifying.planting import CONFIG, E1, Case, Cases, Q, check_found
from tests.verifying.subjects import Spoilt, source_of

CASES = Cases()
planted = CASES.planted


@planted("quark-int8", "not-quantized", Q, "int 8 bits, per channel", "BF16[128, 128]", "exclude")
@planted("ct-int", "not-quantized", Q, "int 8 bits, per channel", "BF16[128, 128]", "ignore")
@planted("ct-packed", "not-quantized", Q, "int 4 bits, group_size 32", "ignore")
@planted("gptq", "not-quantized", Q, "int 4 bits, group_size 32", "dynamic")
@planted("autoround", "not-quantized", Q, "int 4 bits, group_size 128", "extra_config")
@planted("awq", "not-quantized", Q, "int 4 bits, group_size 32", "modules_to_not_convert")
@planted("hf-fp8", "not-quantized", Q, "fp8 8 bits, block 128x128", "modules_to_not_convert")
@planted("ct-nvfp4", "not-quantized", Q, "nvfp4", "ignore")
def a_module_is_put_back_unquantized(s: Spoilt) -> None:
    s.dequantized(Q, source_of("ct-int"))


@planted("quark-int8", "not-in-config", Q, "I8[128, 128]", "exclude")
def excluded_by_name(s: Spoilt) -> None:
    s.quantization["exclude"].append(Q)


@planted("ct-int", "not-in-config", Q, "I8[128, 128]", "ignore")
@planted("ct-mxfp4", "not-in-config", Q, "weight_packed U8[128, 64]", "ignore")
def ignored_by_expression(s: Spoilt) -> None:
    s.quantization["ignore"].append(r"re:.*q_proj$")


@planted("gptq", "not-in-config", Q, "qweight I32[16, 128]", "dynamic")
def kept_out_by_a_dynamic_rule(s: Spoilt) -> None:
    s.quantization["dynamic"] = {r"-:.*q_proj.*": {}, **s.quantization.get("dynamic", {})}


@planted("autoround", "not-in-config", Q, "qweight I32[16, 128]", "extra_config")
def kept_at_16_bits_by_extra_config(s: Spoilt) -> None:
    s.quantization.setdefault("extra_config", {})[Q] = {"bits": 16, "data_type": "fp"}


@planted("autoround", "not-in-config", Q, "scope of the config")
def blocks_that_do_not_cover_the_layer(s: Spoilt) -> None:
    s.quantization["block_name_to_quantize"] = "model.layers.1"


@planted("awq", "not-in-config", Q, "qweight I32[128, 16]", "modules_to_not_convert")
def named_among_the_unconverted(s: Spoilt) -> None:
    s.quantization["modules_to_not_convert"].append("q_proj")


@planted("hf-fp8", "not-in-config", Q, "F8_E4M3[128, 128]", "modules_to_not_convert")
def named_among_the_unconverted_fp8(s: Spoilt) -> None:
    s.quantization["modules_to_not_convert"].append(Q)


@planted("quark-int8", "not-in-config", E1, "no quantization_config")
@planted("gptq", "config-copy", "quantize_config.json", "config.json has no quantization_config", copies=False)
def the_config_is_lost(s: Spoilt) -> None:
    del s.config["quantization_config"]


@planted("gptq-hybrid", "not-quantized", "mtp.layers.0.mlp.experts.0.gate_proj", "dynamic", "does not keep it out")
def the_mtp_rule_is_lost(s: Spoilt) -> None:
    s.quantization["dynamic"] = {k: v for k, v in s.quantization["dynamic"].items() if "mtp" not in k}


@planted("quark-int8-hybrid", "not-quantized", "mtp.layers.0.mlp.experts.down_proj", "stacked as BF16[8, 256, 128]")
def the_stacked_experts_of_the_mtp_head_are_not_excluded(s: Spoilt) -> None:
    s.quantization["exclude"] = [e for e in s.quantization["exclude"] if "mtp" not in e]


@planted("ct-int", "idle-entry", f"{CONFIG}.ignore", "'model.layers.0.mlp.gates' matches no module", "did you mean")
def a_misspelt_ignore_entry(s: Spoilt) -> None:
    s.quantization["ignore"].append("model.layers.0.mlp.gates")


@planted("quark-int8", "idle-entry", f"{CONFIG}.exclude", "'model.layers.9.mlp.gate' matches no module")
def an_exclude_entry_of_another_layer(s: Spoilt) -> None:
    s.quantization["exclude"].append("model.layers.9.mlp.gate")


@planted("autoround", "idle-entry", f"{CONFIG}.extra_config", "'model.layers.0.mlp.router' matches no module")
def an_extra_config_entry_for_nothing(s: Spoilt) -> None:
    s.quantization["extra_config"]["model.layers.0.mlp.router"] = {"bits": 16, "data_type": "fp"}


@planted("hf-fp8", "idle-entry", f"{CONFIG}.modules_to_not_convert", "'model.layers.0.mlp.router' matches no module")
def an_unconverted_module_that_is_not_there(s: Spoilt) -> None:
    s.quantization["modules_to_not_convert"].append("model.layers.0.mlp.router")


@planted("autoround", "idle-entry", f"{CONFIG}.block_name_to_quantize", "'model.blocks' matches no module")
def blocks_of_another_model(s: Spoilt) -> None:
    s.quantization["block_name_to_quantize"] += ",model.blocks"


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_planted_fault_is_found_and_named(case: Case, tmp_path: Path) -> None:
    check_found(case, tmp_path / "spoilt")

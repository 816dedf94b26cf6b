"""Faults planted one at a time in good checkpoints of every layout: each is found, named and explained.

A case says where the finding must point (``where``, exactly) and words that the message must have.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from tensorsurgeon.verifying import verify
from tests.verifying.subjects import Spoilt, source_of, subject

BF16 = ml_dtypes.bfloat16
L = "model.layers.0"
E1 = f"{L}.mlp.experts.1.up_proj"
Q = f"{L}.self_attn.q_proj"
HL = "model.language_model.layers"
CONFIG = "config.json quantization_config"


class Case(NamedTuple):
    name: str
    subject: str
    spoil: Callable[[Spoilt], object]
    kind: str
    where: str
    words: tuple[str, ...]
    against: bool = False
    copies: bool = True


CASES: list[Case] = []


def planted(
    name: str, kind: str, where: str, *words: str, against: bool = False, copies: bool = True
) -> Callable[[Callable[[Spoilt], object]], Callable[[Spoilt], object]]:
    """Register a fault for the subject in front of the colon of ``name``."""

    def register(spoil: Callable[[Spoilt], object]) -> Callable[[Spoilt], object]:
        CASES.append(Case(f"{name}: {spoil.__name__}", name, spoil, kind, where, words, against, copies))
        return spoil

    return register


# -- config against tensors ---------------------------------------------------------------------------------------


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
@planted("gptq", "not-in-config", E1, "no quantization_config", copies=False)
def the_config_is_lost(s: Spoilt) -> None:
    del s.config["quantization_config"]


@planted("gptq-hybrid", "not-quantized", "mtp.layers.0.mlp.experts.0.gate_proj", "dynamic", "does not keep it out")
def the_mtp_rule_is_lost(s: Spoilt) -> None:
    s.quantization["dynamic"] = {k: v for k, v in s.quantization["dynamic"].items() if "mtp" not in k}


@planted("quark-int8-hybrid", "not-quantized", "mtp.layers.0.mlp.experts.down_proj", "stacked as BF16[8, 256, 128]")
def the_stacked_experts_of_the_mtp_head_are_not_excluded(s: Spoilt) -> None:
    s.quantization["exclude"] = [e for e in s.quantization["exclude"] if "mtp" not in e]


# -- tensors of a module ------------------------------------------------------------------------------------------


@planted("quark-int8", "missing-tensor", f"{E1}.weight_scale", "is missing", "F32[128]")
@planted("ct-float", "missing-tensor", f"{E1}.weight_scale", "is missing", "[128, 1]")
@planted("ct-mxfp4", "missing-tensor", f"{E1}.weight_scale", "is missing", "U8", "[128, 4]")
def scales_are_missing(s: Spoilt) -> None:
    s.drop(f"{E1}.weight_scale")


@planted("hf-fp8", "missing-tensor", f"{E1}.weight_scale_inv", "is missing", "[1, 1]")
def block_scales_are_missing(s: Spoilt) -> None:
    s.drop(f"{E1}.weight_scale_inv")


@planted("ct-packed", "missing-tensor", f"{E1}.weight_shape", "is missing", "I64[2]")
def weight_shape_is_missing(s: Spoilt) -> None:
    s.drop(f"{E1}.weight_shape")


@planted("ct-asym", "missing-tensor", f"{E1}.weight_zero_point", "is missing", "I32[16, 4]", "asymmetric")
def zero_points_are_missing(s: Spoilt) -> None:
    s.drop(f"{E1}.weight_zero_point")


@planted("ct-nvfp4", "missing-tensor", f"{E1}.weight_global_scale", "is missing", "F32[1]")
def the_global_scale_is_missing(s: Spoilt) -> None:
    s.drop(f"{E1}.weight_global_scale")


@planted("gptq", "missing-tensor", f"{E1}.qzeros", "is missing", "I32[4, 16]")
@planted("awq", "missing-tensor", f"{E1}.qzeros", "is missing", "I32[4, 16]")
def qzeros_are_missing(s: Spoilt) -> None:
    s.drop(f"{E1}.qzeros")


@planted("ct-packed", "missing-tensor", f"{E1}.weight_packed", "the module has", "weight_shape")
def the_words_are_missing(s: Spoilt) -> None:
    s.drop(f"{E1}.weight_packed")


@planted("ct-packed", "extra-tensor", f"{E1}.weight", "BF16[128, 128]", "is no tensor of")
def the_float_weight_is_still_there(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight"] = np.zeros((128, 128), BF16)


@planted("ct-packed", "extra-tensor", f"{E1}.weight_zero_point", "I32[16, 4] is no tensor of int 4 bits, group_size 32")
def zero_points_of_symmetric_weights(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_zero_point"] = np.zeros((16, 4), np.int32)


@planted("ct-int", "extra-tensor", f"{E1}.weight_g_idx", "is no tensor of")
def an_order_that_no_reader_takes(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_g_idx"] = np.arange(128, dtype=np.int32)


@planted("quark-int8", "shape", f"{E1}.weight_scale", "is [128, 1]", "expected", "F32[128]", "quark-export-rename")
def quark_scales_with_a_trailing_axis(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_scale"] = s.tensors[f"{E1}.weight_scale"].reshape(-1, 1)


@planted("ct-int", "shape", f"{E1}.weight_scale", "is [128]", "[128, 1]")
def ct_scales_without_their_axis(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_scale"] = s.tensors[f"{E1}.weight_scale"].reshape(-1)


@planted("ct-packed", "shape", f"{E1}.weight_scale", "is [128, 4]", "[128, 2]", "these are groups of 32")
def a_group_size_in_the_config_that_is_not_the_files(s: Spoilt) -> None:
    s.ct_group["weights"]["group_size"] = 64


@planted("gptq", "shape", f"{E1}.scales", "is [4, 128]", "[1, 128]", "these are groups of 32")
def a_gptq_group_size_that_is_not_the_files(s: Spoilt) -> None:
    s.quantization["group_size"] = 128


@planted("quark-int4", "shape", f"{E1}.weight_scale", "is [128, 4]", "[4, 128]")
def quark_group_scales_that_are_not_transposed(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_scale"] = np.ascontiguousarray(s.tensors[f"{E1}.weight_scale"].T)


@planted("hf-fp8", "shape", f"{E1}.weight_scale_inv", "is [128, 1]", "[1, 1]")
def channel_scales_where_blocks_are_declared(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_scale_inv"] = np.ones((128, 1), np.float32)


@planted("awq", "shape", f"{E1}.qzeros", "is [4, 15]", "[4, 16]")
def qzeros_that_are_too_short(s: Spoilt) -> None:
    s.tensors[f"{E1}.qzeros"] = np.ascontiguousarray(s.tensors[f"{E1}.qzeros"][:, :15])


@planted("gptq", "dtype", f"{E1}.scales", "is F64", "F16")
def scales_in_double_precision(s: Spoilt) -> None:
    s.tensors[f"{E1}.scales"] = s.tensors[f"{E1}.scales"].astype(np.float64)


@planted("ct-packed", "dtype", f"{E1}.weight_shape", "is I32", "I64")
def weight_shape_in_32_bits(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_shape"] = s.tensors[f"{E1}.weight_shape"].astype(np.int32)


@planted("ct-int", "dtype", f"{E1}.weight", "is U8", "I8")
def codes_without_a_sign(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight"] = s.tensors[f"{E1}.weight"].view(np.uint8)


@planted("ct-packed", "weight-shape", f"{E1}.weight_shape", "says [128, 256]", "holds [128, 128]")
def a_weight_shape_of_another_weight(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_shape"][1] = 256


@planted("ct-packed", "group-size", E1, "group_size 48", "128 inputs")
def a_group_size_that_does_not_divide(s: Spoilt) -> None:
    s.ct_group["weights"]["group_size"] = 48


@planted("quark-int8", "raw-name", f"{E1}.weight_quantizer.scale", "raw Quark export", "quark-export-rename")
def a_key_of_a_raw_quark_export(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_quantizer.scale"] = s.tensors.pop(f"{E1}.weight_scale")


@planted("ct-packed", "missing-expert", f"{L}.mlp.experts.2.down_proj", "has no tensor", "3 of 4 experts")
@planted("gptq", "missing-expert", f"{L}.mlp.experts.2.down_proj", "has no tensor", "3 of 4 experts")
@planted("hf-fp8", "missing-expert", f"{L}.mlp.experts.2.down_proj", "has no tensor", "3 of 4 experts")
def an_expert_is_missing(s: Spoilt) -> None:
    s.drop_module(f"{L}.mlp.experts.2.down_proj")


@planted("quark-int8", "missing-expert", f"{L}.mlp.experts.3.up_proj", "has no tensor", "3 of 4 experts")
def the_last_expert_is_missing(s: Spoilt) -> None:
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        s.drop_module(f"{L}.mlp.experts.3.{leaf}")


@planted("ct-int-hybrid", "stacked-and-split", f"{HL}.1.mlp.experts.gate_up_proj", "one by one too")
def experts_are_both_stacked_and_split(s: Spoilt) -> None:
    s.tensors[f"{HL}.1.mlp.experts.gate_up_proj"] = np.zeros((8, 256, 256), BF16)


# -- siblings -----------------------------------------------------------------------------------------------------


@planted("ct-int", "siblings", f"{L}.self_attn.v_proj", "is unquantized", "qkv_proj")
def v_is_left_out_of_qkv(s: Spoilt) -> None:
    s.dequantized(f"{L}.self_attn.v_proj", source_of("ct-int"))
    s.quantization["ignore"].append(f"{L}.self_attn.v_proj")


@planted("ct-int-hybrid", "siblings", f"{HL}.0.linear_attn.in_proj_a", "in_proj_ba")
def in_proj_a_is_left_out(s: Spoilt) -> None:
    s.dequantized(f"{HL}.0.linear_attn.in_proj_a", source_of("ct-int-hybrid"))
    s.quantization["ignore"].append(f"{HL}.0.linear_attn.in_proj_a")


@planted("fp8-hybrid", "siblings", f"{HL}.2.linear_attn.in_proj_z", "is unquantized", "in_proj_qkvz")
def in_proj_z_is_left_out(s: Spoilt) -> None:
    s.dequantized(f"{HL}.2.linear_attn.in_proj_z", source_of("fp8-hybrid"))
    s.quantization["modules_to_not_convert"].append(f"{HL}.2.linear_attn.in_proj_z")


@planted("quark-int8-hybrid", "siblings", f"{HL}.1.mlp.shared_expert.gate_proj", "gate_up_proj")
def a_shared_expert_is_half_quantized(s: Spoilt) -> None:
    s.dequantized(f"{HL}.1.mlp.shared_expert.gate_proj", source_of("quark-int8-hybrid"))
    s.quantization["exclude"].append(f"{HL}.1.mlp.shared_expert.gate_proj")


@planted("ct-packed", "siblings", f"{L}.mlp.experts.2.gate_proj", "is unquantized", "engines run them as one")
def one_expert_is_left_out(s: Spoilt) -> None:
    name = f"{L}.mlp.experts.2.gate_proj"
    s.dequantized(name, source_of("ct-packed"))
    s.quantization["ignore"].append(name)


@planted("ct-int", "siblings", f"{L}.self_attn.k_proj", "per tensor", "per channel", "qkv_proj")
def k_has_a_scheme_of_its_own(s: Spoilt) -> None:
    name = f"{L}.self_attn.k_proj"
    group = {**s.ct_group, "targets": [f"re:.*{L}.self_attn.k_proj$"], "weights": {**s.ct_group["weights"], "strategy": "tensor"}}
    s.quantization["config_groups"] = {"k": group, **s.quantization["config_groups"]}
    s.tensors[f"{name}.weight_scale"] = s.tensors[f"{name}.weight_scale"][:1, 0].copy()


@planted("ct-nvfp4", "global-scale", f"{L}.self_attn.k_proj.weight_global_scale", "engines take one", "qkv_proj")
def siblings_with_two_global_scales(s: Spoilt) -> None:
    s.tensors[f"{L}.self_attn.k_proj.weight_global_scale"] *= np.float32(2)


# -- entries of the config ----------------------------------------------------------------------------------------


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


# -- values of the config -----------------------------------------------------------------------------------------


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


@planted("gptq", "config", f"{CONFIG}.bits", "found 5")
def bits_that_no_reader_takes(s: Spoilt) -> None:
    s.quantization["bits"] = 5


@planted("awq", "config", f"{CONFIG}.zero_point", "drop the offset of 8")
def awq_without_zero_points(s: Spoilt) -> None:
    s.quantization["zero_point"] = False


@planted("hf-fp8", "config", f"{CONFIG}.weight_block_size", "[128, 128]", "None")
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


# -- numbers ------------------------------------------------------------------------------------------------------


@planted("quark-int8", "scale", f"{E1}.weight_scale[7]", "nan is not finite")
@planted("ct-float", "scale", f"{E1}.weight_scale[7, 0]", "nan is not finite")
def a_scale_is_nan(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_scale"][7] = np.nan


@planted("gptq", "scale", f"{E1}.scales[2, 5]", "inf is not finite")
@planted("awq", "scale", f"{E1}.scales[2, 5]", "inf is not finite")
def a_scale_overflowed_f16(s: Spoilt) -> None:
    s.tensors[f"{E1}.scales"][2, 5] = np.inf


@planted("ct-mxfp4", "scale", f"{E1}.weight_scale[3, 1]", "255")
def an_exponent_that_is_no_number(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_scale"].view(np.uint8)[3, 1] = 255


@planted("ct-nvfp4", "scale", f"{E1}.weight_global_scale", "is 0")
def a_global_scale_of_zero(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_global_scale"][0] = 0


@planted("ct-packed", "zero-scale", f"{E1}.weight_scale", "codes are not zero", "output 9, input")
def a_zero_scale_over_codes(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_scale"][9, 2] = 0


@planted("gptq", "zero-scale", f"{E1}.scales", "codes are not zero", "output 9, input")
def a_zero_gptq_scale_over_codes(s: Spoilt) -> None:
    s.tensors[f"{E1}.scales"][2, 9] = 0


@planted("quark-int8", "negative-scale", f"{E1}.weight_scale[11]", "is negative")
def a_flipped_sign(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_scale"][11] *= -1


@planted("ct-nvfp4", "negative-scale", f"{E1}.weight_scale[11, 2]", "is negative")
def a_flipped_sign_of_a_local_scale(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_scale"].view(np.uint8)[11, 2] |= 0x80


@planted("ct-float", "nan", f"{E1}.weight", "row 5, column 17 is NaN")
@planted("hf-fp8", "nan", f"{E1}.weight", "row 5, column 17 is NaN")
def an_fp8_code_is_nan(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight"].view(np.uint8)[5, 17] = 0xFF


@planted("quark-int8", "zero-point", f"{E1}.weight_zero_point[4]", "not zero", "symmetric")
def a_zero_point_of_symmetric_quark_weights(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_zero_point"] = np.zeros(128, np.int32)
    s.tensors[f"{E1}.weight_zero_point"][4] = 3


@planted("gptq", "gptq-version", f"{E1}.qzeros", "stored as 7", "these are words of v1", copies=True)
def v1_words_declared_as_v2(s: Spoilt) -> None:
    for key in ("checkpoint_format", "format"):
        s.quantization[key] = "gptq_v2"


@planted("gptq-v2", "gptq-version", f"{E1}.qzeros", "stored as 8", "these are words of v2")
def v2_words_declared_as_v1(s: Spoilt) -> None:
    for key in ("checkpoint_format", "format"):
        s.quantization[key] = "gptq"


@planted("autoround", "gptq-version", f"{E1}.qzeros", "stored as 7", "these are words of v1")
def autoround_words_declared_as_gptqmodels(s: Spoilt) -> None:
    s.quantization["packing_format"] = "auto_round:gptqmodel"


@planted("gptq", "zero-point", f"{E1}.qzeros[1, 8]", "symmetric", "stored as 7")
def a_zero_point_that_is_not_the_middle(s: Spoilt) -> None:
    s.tensors[f"{E1}.qzeros"][1, 1] ^= 0x5


@planted("gptq", "g-idx", f"{E1}.g_idx[5]", "desc_act false")
def an_order_of_inputs_without_desc_act(s: Spoilt) -> None:
    order = s.tensors[f"{E1}.g_idx"] = (np.arange(128) // 32).astype(np.int32)
    order[5], order[90] = order[90], order[5]


@planted("ct-packed-3bit", "padding", f"{E1}.weight_packed", "row 6", "behind its 120 codes")
def bits_behind_the_last_code(s: Spoilt) -> None:
    packed = s.tensors[f"{E1}.weight_packed"]
    s.tensors[f"{E1}.weight_shape"][1] = 120
    packed[:, -1] = 0
    packed[6, -1] = -(1 << 30)


@planted("ct-int", "scale", f"{E1}.input_scale[0]", "-1.0 is not a positive number")
def a_static_input_scale_below_zero(s: Spoilt) -> None:
    s.ct_group["input_activations"].update(dynamic=False, strategy="tensor")
    for name in [n for n in s.tensors if n.endswith("_proj.weight_scale")]:
        s.tensors[name.replace("weight_scale", "input_scale")] = np.ones(1, BF16)
    s.tensors[f"{E1}.input_scale"][0] = -1


# -- against the source -------------------------------------------------------------------------------------------


@planted(
    "quark-int4", "fidelity", E1, "dB against the source", "read with pack_method 'order'", "the config is wrong", against=True
)
def quark_words_in_the_other_order(s: Spoilt) -> None:
    s.quantization["export"]["pack_method"] = "reorder"


@planted("quark-int8", "fidelity", E1, "dB against the source", "other weights", against=True)
@planted("ct-float", "fidelity", E1, "dB against the source", "other weights", against=True)
def two_experts_swapped(s: Spoilt) -> None:
    other = f"{L}.mlp.experts.2.up_proj"
    for local in ("weight", "weight_scale"):
        a, b = f"{E1}.{local}", f"{other}.{local}"
        s.tensors[a], s.tensors[b] = s.tensors[b], s.tensors[a]


@planted("awq", "fidelity", E1, "dB against the source", against=True)
@planted("gptq", "fidelity", E1, "dB against the source", against=True)
def words_of_another_expert(s: Spoilt) -> None:
    s.tensors[f"{E1}.qweight"] = s.tensors[f"{L}.mlp.experts.2.up_proj.qweight"].copy()


@planted("ct-packed", "fidelity", E1, "1 rows, row 33 first", "larger than the weights themselves", against=True)
@planted("ct-nvfp4", "fidelity", E1, "1 rows, row 33 first", "larger than the weights themselves", against=True)
def one_row_of_garbage(s: Spoilt) -> None:
    packed = s.tensors[f"{E1}.weight_packed"]
    packed[33] = packed[34]


@planted("ct-int", "bytes", f"{L}.mlp.gate.weight", "differs from the source from element [2, 3] on", against=True)
def a_router_weight_changed(s: Spoilt) -> None:
    s.tensors[f"{L}.mlp.gate.weight"].view(np.uint16)[2, 3] ^= 1


@planted("ct-int", "lost", "model.norm.weight", "the source has BF16[128]", against=True)
def a_norm_is_lost(s: Spoilt) -> None:
    s.drop("model.norm.weight")


@planted("ct-int", "lost", f"{Q}.weight", "nothing here stands for it", against=True)
def a_whole_linear_is_lost(s: Spoilt) -> None:
    s.drop_module(Q)


@planted("ct-int", "new", "model.layers.0.self_attn.sinks", "comes from no tensor of the source", against=True)
def a_tensor_from_nowhere(s: Spoilt) -> None:
    s.tensors["model.layers.0.self_attn.sinks"] = np.ones(4, BF16)


@planted("split", "bytes", f"{HL}.0.mlp.experts.3.up_proj.weight", "differs", "experts.gate_up_proj, row", against=True)
def gate_and_up_are_swapped(s: Spoilt) -> None:
    a, b = (f"{HL}.0.mlp.experts.3.{leaf}_proj.weight" for leaf in ("gate", "up"))
    s.tensors[a], s.tensors[b] = s.tensors[b], s.tensors[a]


@planted("split", "missing-tensor", f"{HL}.0.mlp.experts.3.up_proj.weight", "the source has it in", against=True)
def one_split_expert_is_lost(s: Spoilt) -> None:
    s.drop(f"{HL}.0.mlp.experts.3.up_proj.weight")


@planted("ct-w4a16-g32", "source-shape", f"{HL}.0.mlp.experts.0.down_proj", "holds a weight [128, 128]", against=True)
def an_expert_of_another_size(s: Spoilt) -> None:
    name = f"{HL}.0.mlp.experts.0.down_proj"
    for local in ("weight_packed", "weight_scale"):
        s.tensors[f"{name}.{local}"] = s.tensors[f"{name}.{local}"][:128].copy()
    s.tensors[f"{name}.weight_shape"][0] = 128


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_planted_fault_is_found_and_named(case: Case, tmp_path: Path) -> None:
    spoilt = Spoilt(subject(case.subject), tmp_path / "spoilt")
    case.spoil(spoilt)
    folder = spoilt.save(copies=case.copies)
    found = verify(folder, source_of(case.subject) if case.against else None, workers=1)
    hits = [f for f in found.faults if (f.kind, f.where) == (case.kind, case.where)]
    assert hits, [str(f) for f in found.faults]
    message = " | ".join(f.message for f in hits)
    assert not [word for word in case.words if word not in message], message


def test_every_layout_has_planted_faults_and_there_are_thirty_kinds() -> None:
    assert len({case.spoil.__name__ for case in CASES}) >= 30
    assert {case.subject.split("-")[0] for case in CASES} >= {"quark", "ct", "gptq", "autoround", "awq", "hf"}

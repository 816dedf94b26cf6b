"""A module has the wrong tensors, or is not stored as the modules that engines run it with."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.verifying.planting import E1, HL, Case, Cases, L, check_found
from tests.verifying.subjects import Spoilt, source_of

BF16 = ml_dtypes.bfloat16
CASES = Cases()
planted = CASES.planted


@planted("quark-int8", "missing-tensor", f"{E1}.weight_scale", "is missing", "F32[128]")
@planted("ct-float", "missing-tensor", f"{E1}.weight_scale", "is missing", "[128, 1]")
@planted("ct-mxfp4", "missing-tensor", f"{E1}.weight_scale", "is missing", "U8", "[128, 4]")
def scales_are_missing(s: Spoilt) -> None:
    s.drop(f"{E1}.weight_scale")


@planted("hf-fp8", "missing-tensor", f"{E1}.weight_scale_inv", "is missing", "[1, 1]")
def block_scales_are_missing(s: Spoilt) -> None:
    s.drop(f"{E1}.weight_scale_inv")


@planted("ct-packed", "missing-tensor", f"{E1}.weight_shape", "is missing", "I64")
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


@planted("ct-packed", "dtype", f"{E1}.weight_shape", "is F32", "I64 or I32")
def weight_shape_in_floats(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_shape"] = s.tensors[f"{E1}.weight_shape"].astype(np.float32)


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


@planted("ct-int", "router", f"{L}.mlp.gate", "I8[4, 128]", "no quantization config", "keep it in float")
def the_router_is_quantized_too(s: Spoilt) -> None:
    s.tensors[f"{L}.mlp.gate.weight"] = np.ones((4, 128), np.int8)
    s.tensors[f"{L}.mlp.gate.weight_scale"] = np.ones((4, 1), BF16)
    s.quantization["ignore"] = [e for e in s.quantization["ignore"] if "gate" not in e]


@planted("ct-int", "expert-shape", f"{L}.mlp.experts.2.up_proj", "a weight [64, 128]", "is [128, 128]", "stack")
@planted("ct-float", "expert-shape", f"{L}.mlp.experts.2.up_proj", "a weight [64, 128]", "is [128, 128]", "stack")
def an_expert_is_smaller_than_the_others(s: Spoilt) -> None:
    for local in ("weight", "weight_scale"):
        name = f"{L}.mlp.experts.2.up_proj.{local}"
        s.tensors[name] = s.tensors[name][:64].copy()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_planted_fault_is_found_and_named(case: Case, tmp_path: Path) -> None:
    check_found(case, tmp_path / "spoilt")

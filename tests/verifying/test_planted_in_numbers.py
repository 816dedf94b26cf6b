"""Scales, zero points, orders and codes that no tool of the format writes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.verifying.planting import E1, Case, Cases, check_found
from tests.verifying.subjects import Spoilt

BF16 = ml_dtypes.bfloat16
CASES = Cases()
planted = CASES.planted


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


@planted("ct-packed", "negative-scale", f"{E1}.weight_scale[0, 0]", "512 of the 512 scales")
def every_sign_of_a_module_flipped(s: Spoilt) -> None:
    s.tensors[f"{E1}.weight_scale"] *= BF16(-1)


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


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_planted_fault_is_found_and_named(case: Case, tmp_path: Path) -> None:
    check_found(case, tmp_path / "spoilt")

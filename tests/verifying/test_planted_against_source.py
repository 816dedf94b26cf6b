"""The checkpoint is in order, but it is not the source."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.verifying.planting import E1, HL, Case, Cases, L, Q, check_found
from tests.verifying.subjects import Spoilt

BF16 = ml_dtypes.bfloat16
CASES = Cases()
planted = CASES.planted


@planted(
    "quark-int4", "fidelity", E1, "dB against the source", "read with pack_method 'order'", "the config is wrong", against=True
)
def quark_words_in_the_other_order(s: Spoilt) -> None:
    s.quantization["export"]["pack_method"] = "reorder"


@planted("gptq-asym", "fidelity", E1, "1.0 steps too low", "zero points", "read with gptq_v2", against=True)
def v2_words_of_asymmetric_weights_declared_as_v1(s: Spoilt) -> None:
    """The words alone cannot tell: only constant zero points give their version away."""
    for key in ("checkpoint_format", "format"):
        s.quantization[key] = "gptq"


@planted("awq", "fidelity", E1, "1.0 steps too", "the zero points are read wrongly", against=True)
def awq_zero_points_in_the_convention_of_gptq(s: Spoilt) -> None:
    qzeros = s.tensors[f"{E1}.qzeros"]
    # No nibble of these is 0, so that taking 1 from each borrows from none.
    nibbles = (qzeros.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    assert nibbles.min() > 0
    s.tensors[f"{E1}.qzeros"] = (qzeros.view(np.uint32) - np.uint32(0x11111111)).view(np.int32)


@planted("ct-asym", "fidelity", E1, "1.0 steps too", "the zero points are read wrongly", against=True)
def ct_zero_points_that_are_one_too_high(s: Spoilt) -> None:
    words = s.tensors[f"{E1}.weight_zero_point"].view(np.uint32)
    nibbles = (words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    assert nibbles.max() < 15
    s.tensors[f"{E1}.weight_zero_point"] = (words + np.uint32(0x11111111)).view(np.int32)


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


@planted("ct-packed", "fidelity", E1, "1 row, row 33 first", "larger than the weights themselves", against=True)
@planted("ct-nvfp4", "fidelity", E1, "1 row, row 33 first", "larger than the weights themselves", against=True)
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


@planted("ct-float", "source-shape", f"{L}.mlp.experts.2.up_proj", "[64, 128]", "the source has", "[128, 128]", against=True)
def a_linear_of_another_size(s: Spoilt) -> None:
    for local in ("weight", "weight_scale"):
        name = f"{L}.mlp.experts.2.up_proj.{local}"
        s.tensors[name] = s.tensors[name][:64].copy()


@planted("gptq", "fidelity", E1, "reads as NaN or infinity in 1 row", "row 5 first", against=True)
@planted("awq", "fidelity", E1, "reads as NaN or infinity in 1 row", "row 5 first", against=True)
def an_infinite_scale(s: Spoilt) -> None:
    s.tensors[f"{E1}.scales"][2, 5] = np.inf


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_planted_fault_is_found_and_named(case: Case, tmp_path: Path) -> None:
    check_found(case, tmp_path / "spoilt")

from __future__ import annotations

from tensorsurgeon.formats.hf_fp8 import HfFp8
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16, F32
from tensorsurgeon.tensors.spec import TensorSpec
from tests.contract.formats import Case, FormatContract, Mutation, Refusal
from tests.contract.goldens import Golden, GoldenContract
from tests.contract.written_models import under, written

LAYOUT = HfFp8()
FP8 = Scheme(type="fp8", block=(128, 128))


class TestHfFp8(FormatContract):
    CASES = (Case(LAYOUT, FP8), Case(LAYOUT, Scheme(type="fp8", block=(128, 128), scale_dtype=BF16)))
    REFUSALS = (Refusal(LAYOUT, TensorSpec("m.weight", BF16, (8, 8)), Scheme(type="fp8"), r"block \(128, 128\), found None"),)
    MUTATIONS = (
        Mutation(("weight_block_size",), None, "weight_block_size: expected"),
        Mutation(("fmt",), "e5m2", "fmt: found 'e5m2'"),
        Mutation(("modules_to_not_convert",), ["lm_head"], "nothing keeps model.visual"),
    )


class TestHfFp8Golden(GoldenContract):
    GOLDENS = (
        Golden(
            "transformers-fp8-block32x64", LAYOUT, Scheme(type="fp8", block=(32, 64)),
            refused_by_check=("edges", "extremes", "single"),
        ),
    )  # fmt: skip


def test_scales_are_f32_and_cut_off_at_the_edges():
    weight = TensorSpec("m.weight", BF16, (200, 128))
    assert LAYOUT.tensors(weight, FP8)[1] == TensorSpec("weight_scale_inv", F32, (2, 1))


def test_exceptions_are_exact_names_with_one_for_the_experts_of_the_mtp_layer():
    config = LAYOUT.config_files(written(LAYOUT, under(FP8))).quantization_config
    left = config["modules_to_not_convert"]
    assert "mtp.layers.0.mlp.experts" in left
    assert {"lm_head", "mtp.fc", "model.visual.blocks.1.attn.proj"} <= set(left)
    assert not any(set(entry) & set("*:^$\\") for entry in left)

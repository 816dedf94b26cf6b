from __future__ import annotations

import numpy as np
import pytest

from tensorsurgeon.errors import SpecError
from tensorsurgeon.formats.awq import Awq
from tensorsurgeon.formats.base import QuantizedModel
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F16, I32
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec
from tests.contract.formats import Case, FormatContract, Mutation, Refusal
from tests.contract.goldens import Golden, GoldenContract
from tests.contract.written_models import under, written

LAYOUT = Awq()
WEIGHT = TensorSpec("m.weight", BF16, (64, 128))


def w(group_size: int, symmetric: bool = False) -> Scheme:
    return Scheme(num_bits=4, group_size=group_size, symmetric=symmetric, rule="awq")


class TestAwq(FormatContract):
    CASES = (Case(LAYOUT, w(32), 8), Case(LAYOUT, w(128, symmetric=True), 8), Case(LAYOUT, w(-1), 8))
    REFUSALS = (
        Refusal(LAYOUT, WEIGHT, Scheme(num_bits=8), "num_bits 4, found 8"),
        Refusal(LAYOUT, TensorSpec("m.weight", BF16, (20, 128)), w(32), "out_features divisible by 8 .* found 20"),
    )
    MUTATIONS = (
        Mutation(("version",), "gemv", "version: found 'gemv'"),
        Mutation(("zero_point",), False, "zero_point: found False"),
        Mutation(("bits",), 8, "bits: found 8"),
        Mutation(("modules_to_not_convert",), ["linear_attn"], "modules_to_not_convert: says"),
    )


class TestAwqGolden(GoldenContract):
    GOLDENS = (
        # AutoAWQ lets a group's minimum lie above 0 and then clips its zero point: rows of "edges" come out far off.
        Golden("autoawq-gemm-g32", LAYOUT, w(32), unlike=("edges", "half", "single")),
        Golden("autoawq-gemm-g128", LAYOUT, w(128), unlike=("edges", "single")),
    )


def test_codes_are_interleaved_along_the_outputs():
    codes = np.repeat(np.arange(-8, 0, dtype=np.int8)[:, None], 32, 1)
    qweight, qzeros, scales = LAYOUT.pack(
        Quantized(codes, np.ones((8, 1), np.float32)), LAYOUT.resolve_scheme(w(-1, symmetric=True), BF16)
    )
    assert set(qweight.view(np.uint32).flat) == {0x75316420}
    assert qzeros.view(np.uint32).tolist() == [[0x88888888]]
    assert (qweight.shape, scales.dtype, scales.shape) == ((32, 1), np.float16, (1, 8))


def test_planned_tensors():
    assert LAYOUT.tensors(WEIGHT, w(32)) == (
        TensorSpec("qweight", I32, (128, 8)),
        TensorSpec("qzeros", I32, (4, 8)),
        TensorSpec("scales", F16, (4, 64)),
    )


def test_exceptions_are_substrings_that_hit_no_quantized_module():
    config = LAYOUT.config_files(written(LAYOUT, under(LAYOUT.resolve_scheme(w(32), BF16)))).quantization_config
    assert config["zero_point"] is True
    assert config["modules_to_not_convert"] == [
        "visual", "linear_attn.in_proj_b", "linear_attn.in_proj_a", "mlp.gate", "mlp.shared_expert_gate", "lm_head", "mtp",
    ]  # fmt: skip


def dense_and_sparse(router_layer: int) -> QuantizedModel:
    """Layer 0 has a dense MLP; ``router_layer`` has a router whose name is part of ``gate_up_proj``."""
    scheme = LAYOUT.resolve_scheme(w(32), BF16)
    modules = {f"model.layers.0.mlp.{leaf}": scheme for leaf in ("gate_proj", "up_proj", "down_proj")}
    router = f"model.layers.{router_layer}.mlp.gate"
    specs = SpecMap([TensorSpec(f"{router}.weight", BF16, (8, 64)), TensorSpec("lm_head.weight", BF16, (64, 64))])
    return QuantizedModel(modules=modules, unquantized=(router, "lm_head"), specs=specs)


def test_a_router_beside_a_dense_mlp_is_named_with_its_layer():
    config = LAYOUT.config_files(dense_and_sparse(router_layer=1)).quantization_config
    assert config["modules_to_not_convert"] == ["layers.1.mlp.gate", "lm_head"]


def test_a_name_that_is_part_of_a_quantized_one_is_refused():
    with pytest.raises(SpecError, match=r"model.layers.0.mlp.gate is not quantized.*part of model.layers.0.mlp.gate_"):
        LAYOUT.config_files(dense_and_sparse(router_layer=0))

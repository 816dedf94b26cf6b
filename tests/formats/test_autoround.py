from __future__ import annotations

import numpy as np
import pytest

from tensorsurgeon.errors import SpecError
from tensorsurgeon.formats.autoround import AWQ, AutoRound
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16
from tensorsurgeon.tensors.spec import TensorSpec
from tests.contract.formats import Case, FormatContract, Mutation, Refusal
from tests.contract.goldens import Golden, GoldenContract
from tests.contract.written_models import under, written

GPTQ, AS_AWQ, DIRECT = AutoRound(), AutoRound(AWQ), AutoRound("auto_round")
# AutoRound stores an infinite F16 scale for it.
EXTREMES = ("extremes",)
WEIGHT = TensorSpec("m.weight", BF16, (64, 128))
LAYER = "model.language_model.layers.0"


def w(num_bits: int, group_size: int, symmetric: bool = True) -> Scheme:
    return Scheme(num_bits=num_bits, group_size=group_size, symmetric=symmetric, rule="autoround")


class TestAutoRound(FormatContract):
    CASES = (
        Case(GPTQ, w(4, 32), 32, 32),
        Case(GPTQ, w(8, -1), 32, 32),
        Case(AS_AWQ, w(4, 128), 32, 32),
        Case(AS_AWQ, w(4, 32, symmetric=False), 32, 32),
        Case(DIRECT, w(4, 32, symmetric=False), 32, 32),
    )
    REFUSALS = (
        Refusal(GPTQ, WEIGHT, w(4, 32, symmetric=False), "in the format autoround-awq"),
        Refusal(AS_AWQ, WEIGHT, w(8, 32), "num_bits 4, found 8"),
        Refusal(GPTQ, TensorSpec("m.weight", BF16, (1, 128)), w(4, 32), "out_features divisible by 32"),
    )
    MUTATIONS = (
        Mutation(("packing_format",), "auto_round:llm_compressor", "packing_format: found"),
        Mutation(("packing_format",), "auto_round", "expected 'auto_round:auto_gptq'"),
        Mutation(("data_type",), "mx_fp", "data_type: found 'mx_fp'"),
        Mutation(("extra_config",), {}, f"nothing keeps {LAYER}.linear_attn.in_proj_b out"),
        Mutation(("extra_config", f"{LAYER}.linear_attn.out_proj"), {"bits": 16}, "says .*out_proj is not quantized"),
        Mutation(("block_name_to_quantize",), "model.visual.blocks", f"says {LAYER}"),
        Mutation(("bits",), "4", "bits: found '4'"),
    )


class TestAutoRoundGolden(GoldenContract):
    GOLDENS = (
        # The last word of 20 zero points: AutoRound fills the unused nibbles with 7 as well.
        Golden("autoround_file-int4-g32", GPTQ, w(4, 32), not_packed=("odd",), overflown=EXTREMES),
        Golden("autoround_file-int8-g32", GPTQ, w(8, 32), refused_by_check=("odd",)),
        Golden("autoround_file-int4-g32-asym", DIRECT, w(4, 32, symmetric=False), refused_by_check=("odd",), overflown=EXTREMES),
        # Its groups of 128 are padded where 128 does not divide the inputs, which no engine reads.
        Golden("autoround_file-int4-g128", GPTQ, w(4, 128), not_packed=("odd",), overflown=EXTREMES),
        Golden("autoround_file-int4-g128-asym", DIRECT, w(4, 128, symmetric=False), not_packed=("odd",), overflown=EXTREMES),
        Golden("autoround-awq-g32", AS_AWQ, w(4, 32), overflown=EXTREMES),
        Golden("autoround-awq-g32-asym", AS_AWQ, w(4, 32, symmetric=False), overflown=EXTREMES),
        Golden("autoround-awq-g128-asym", AS_AWQ, w(4, 128, symmetric=False), overflown=EXTREMES),
    )


def test_symmetric_words_are_those_of_gptq_v1_without_g_idx():
    quantized = Quantized(np.tile(np.arange(-8, 8, dtype=np.int8), (32, 2)), np.full((32, 1), -0.5, np.float32))
    qweight, qzeros, scales = GPTQ.pack(quantized, GPTQ.resolve_scheme(w(4, -1), BF16))
    assert qweight.view(np.uint32)[:2, 0].tolist() == [0x76543210, 0xFEDCBA98]
    assert set(qzeros.view(np.uint32).flat) == {0x77777777}
    assert (scales == np.float16(-0.5)).all()


def test_every_float_linear_inside_the_blocks_has_an_entry_and_in_proj_ba_too():
    files = GPTQ.config_files(written(GPTQ, under(GPTQ.resolve_scheme(w(4, 32), BF16))))
    config = files.quantization_config
    assert files.extra_files == {"quantization_config.json": config}
    assert config["block_name_to_quantize"] == "model.language_model.layers"
    entries = {
        f"model.language_model.layers.{layer}.{leaf}"
        for layer in range(4)
        for leaf in (
            ("mlp.gate", "mlp.shared_expert_gate")
            if layer == 3
            else (
                "linear_attn.in_proj_a", "linear_attn.in_proj_b", "linear_attn.in_proj_ba", "mlp.gate",
                "mlp.shared_expert_gate",
            )
        )
    }  # fmt: skip
    assert set(config["extra_config"]) == entries
    assert set(map(str, config["extra_config"].values())) == {"{'bits': 16, 'data_type': 'float'}"}


def test_other_schemes_go_into_extra_config_but_not_for_experts():
    four, eight = (GPTQ.resolve_scheme(w(bits, 32), BF16) for bits in (4, 8))

    def mixed(module: str, where: str) -> Scheme | None:
        base = under(four)(module)
        return eight if base and where in module else base

    model = written(GPTQ, lambda module: mixed(module, ".self_attn."))
    config = GPTQ.config_files(model).quantization_config
    assert GPTQ.read_config(config, model.specs) == dict(model.modules)
    with pytest.raises(SpecError, match="one scheme for the experts of all layers"):
        GPTQ.config_files(written(GPTQ, lambda module: mixed(module, "layers.1.mlp.experts.")))

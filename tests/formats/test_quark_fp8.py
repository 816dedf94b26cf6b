from __future__ import annotations

from tensorsurgeon.formats.quark_fp8 import QuarkFp8
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16
from tensorsurgeon.tensors.spec import TensorSpec
from tests.contract.formats import Case, FormatContract, Mutation, Refusal
from tests.contract.goldens import Golden, GoldenContract

LAYOUT = QuarkFp8()
FP8 = Scheme(type="fp8", rule="quark")
GENERAL = ("global_quant_config", "weight")


class TestQuarkFp8(FormatContract):
    CASES = (Case(LAYOUT, FP8), Case(LAYOUT, Scheme(type="fp8", rule="quark", scale_dtype=BF16)))
    REFUSALS = (Refusal(LAYOUT, TensorSpec("m.weight", BF16, (8, 8)), Scheme(type="fp8", block=(128, 128)), "block None"),)
    MUTATIONS = (
        Mutation((*GENERAL, "qscheme"), "per_group", "qscheme: found 'per_group'"),
        Mutation((*GENERAL,), [{}, {}], "weights quantized in 2 stages"),
    )


class TestQuarkFp8Golden(GoldenContract):
    GOLDENS = (Golden("quark-fp8-channel", LAYOUT, FP8), Golden("quark_file-fp8-channel", LAYOUT, FP8))

from __future__ import annotations

import numpy as np

from tensorsurgeon.formats.ct_mxfp4 import CtMxfp4
from tensorsurgeon.formats.ct_nvfp4 import CtNvfp4
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F8_E4M3, F8_E8M0
from tensorsurgeon.tensors.spec import TensorSpec
from tests.contract.formats import Case, FormatContract, Mutation, Refusal
from tests.contract.goldens import Golden, GoldenContract

NV, MX = CtNvfp4(), CtMxfp4()
NVFP4 = Scheme(type="nvfp4", num_bits=4, group_size=16)
MXFP4 = Scheme(type="mxfp4", num_bits=4, group_size=32)
GROUP = ("config_groups", "group_0", "weights")
ALL_CODES = np.arange(16, dtype=np.uint8)


class TestCtNvfp4(FormatContract):
    CASES = (Case(NV, NVFP4),)
    REFUSALS = (
        Refusal(NV, TensorSpec("m.weight", BF16, (8, 24)), NVFP4, "group_size 16 does not divide in_features 24"),
        Refusal(NV, TensorSpec("m.weight", BF16, (8, 64)), MXFP4, "type nvfp4, found mxfp4"),
    )
    MUTATIONS = (Mutation((*GROUP, "group_size"), 32, "group_size: found 32"),)


class TestCtMxfp4(FormatContract):
    CASES = (Case(MX, MXFP4),)
    REFUSALS = (Refusal(MX, TensorSpec("m.weight", BF16, (8, 48)), MXFP4, "group_size 32 does not divide"),)
    MUTATIONS = (Mutation((*GROUP, "strategy"), "tensor_group", "strategy: found 'tensor_group'"),)


class TestFp4Golden(GoldenContract):
    GOLDENS = (Golden("llmcompressor-nvfp4a16", NV, NVFP4), Golden("llmcompressor-mxfp4a16", MX, MXFP4))


def test_two_codes_share_a_byte_the_first_in_the_low_nibble():
    # 0 .5 1 1.5 2 3 4 6 and -.5 -1 -1.5 -2 -3 -4 -6 0, as formats.md spells them
    codes = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 0]], np.uint8)
    quantized = Quantized(codes, np.array([[208.0]], np.float32), global_scale=np.array([1792.0], np.float32))
    packed, scale, total = NV.pack(quantized, NV.resolve_scheme(NVFP4, BF16))
    assert packed.tobytes().hex(" ") == "10 32 54 76 a9 cb ed 0f"
    assert (scale.dtype, scale.tolist()) == (F8_E4M3.numpy, [[208.0]])
    assert total.tolist() == [1792.0]


def test_mxfp4_scales_are_exponents_with_a_bias_of_127():
    scale = np.array([[0.125, 0.25, 1.0, 2.0]], np.float32)
    quantized = Quantized(np.tile(ALL_CODES, (1, 8)), scale)
    _, exponents = MX.pack(quantized, MX.resolve_scheme(MXFP4, BF16))
    assert exponents.tolist() == [[124, 125, 127, 128]]
    assert MX.resolve_scheme(MXFP4, BF16).scale_dtype is F8_E8M0

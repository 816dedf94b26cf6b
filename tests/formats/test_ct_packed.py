from __future__ import annotations

import numpy as np
import pytest

from tensorsurgeon.errors import CheckpointError, SpecError
from tensorsurgeon.formats.ct_packed import CtPacked
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F32, I32, I64
from tensorsurgeon.tensors.spec import TensorSpec
from tests.contract.formats import Case, FormatContract, Mutation, Refusal
from tests.contract.goldens import Golden, GoldenContract

LAYOUT = CtPacked()
WEIGHT = TensorSpec("model.visual.blocks.0.mlp.linear_fc2.weight", BF16, (1152, 4304))
GROUP = ("config_groups", "group_0")


def w(num_bits: int, group_size: int, symmetric: bool = True) -> Scheme:
    return Scheme(num_bits=num_bits, group_size=group_size, symmetric=symmetric)


class TestCtPacked(FormatContract):
    CASES = (
        Case(LAYOUT, w(4, 32)),
        Case(LAYOUT, w(4, 128)),
        *(Case(LAYOUT, w(bits, -1)) for bits in range(2, 9)),
        *(Case(LAYOUT, w(bits, 16, symmetric=False)) for bits in range(2, 9)),
        Case(LAYOUT, w(4, -1, symmetric=False), weight_dtype=F32),
    )
    REFUSALS = (
        Refusal(
            LAYOUT, WEIGHT, w(4, 128),
            "group_size 128 does not divide in_features 4304; use a divisor such as 16 or 2152, or -1 for one",
        ),
        Refusal(LAYOUT, WEIGHT, w(4, 0), "neither positive nor -1"),
        Refusal(LAYOUT, WEIGHT, w(9, -1), "num_bits 2 or 3"),
        Refusal(LAYOUT, WEIGHT, Scheme(type="nvfp4", num_bits=4), "type int, found nvfp4"),
    )  # fmt: skip
    MUTATIONS = (
        Mutation((*GROUP, "weights", "num_bits"), 9, "num_bits: found 9"),
        Mutation((*GROUP, "weights", "type"), "float", "type: found 'float'"),
        Mutation((*GROUP, "weights", "symmetric"), False, "lacks .*weight_zero_point"),
        Mutation((*GROUP, "weights", "symmetric"), "yes", "expected true or false"),
        Mutation((*GROUP, "weights", "group_size"), "32", "expected an integer"),
        Mutation((*GROUP, "weights"), None, r"group_0\.weights: expected a mapping"),
    )


class TestCtPackedGolden(GoldenContract):
    GOLDENS = (
        Golden("llmcompressor-w4a16-g32", LAYOUT, w(4, 32)),
        Golden("llmcompressor-w4a16-g128", LAYOUT, w(4, 128)),
        Golden("llmcompressor-w4a16-channel", LAYOUT, w(4, -1)),
        Golden("llmcompressor-w8a16-channel", LAYOUT, w(8, -1)),
        Golden("llmcompressor-w4a16-g32-asym", LAYOUT, w(4, 32, symmetric=False)),
        Golden("llmcompressor-w4a16-g128-asym", LAYOUT, w(4, 128, symmetric=False)),
        Golden("llmcompressor-w8a16-g32-asym", LAYOUT, w(8, 32, symmetric=False)),
    )


def packed(codes: list[list[int]], num_bits: int, zero_point: list[list[int]] | None = None) -> list[np.ndarray]:
    array = np.array(codes, np.int8)
    zeros = None if zero_point is None else np.array(zero_point, np.int8)
    scheme = Scheme(num_bits=num_bits, symmetric=zeros is None, scale_dtype=BF16)
    return list(LAYOUT.pack(Quantized(array, np.ones((len(array), 1), np.float32), zeros), scheme))


def test_int4_codes_from_minus_8_fill_words_in_natural_order():
    words = packed([list(range(-8, 8))], 4)[0]
    assert words.view(np.uint32).tolist() == [[0x76543210, 0xFEDCBA98]]
    assert words.tolist() == [[1985229328, -19088744]]


def test_int8_codes_are_stored_with_128_added():
    words = packed([[-128, -1, 0, 127, 1, 2, 3, 4]], 8)[0]
    assert words.view(np.uint32).tolist() == [[0xFF807F00, 0x84838281]]


def test_zero_points_are_packed_along_the_outputs():
    column = [[-8], [-3], [0], [7], [1], [2], [3], [4]]
    _, _, zeros, shape = packed([[0]] * 8, 4, column)
    assert zeros.view(np.uint32).tolist() == [[0xCBA9F850]]
    assert shape.tolist() == [8, 1]


def test_planned_tensors_of_an_odd_weight():
    found = LAYOUT.tensors(TensorSpec("m.weight", BF16, (20, 160)), w(4, 32, symmetric=False))
    assert found == (
        TensorSpec("weight_packed", I32, (20, 20)),
        TensorSpec("weight_scale", BF16, (20, 5)),
        TensorSpec("weight_zero_point", I32, (3, 5)),
        TensorSpec("weight_shape", I64, (2,)),
    )


def test_weight_shape_that_does_not_fit_the_words_is_refused():
    words, scale, shape = packed([[1] * 16], 4)
    arrays = {"weight_packed": words, "weight_scale": scale, "weight_shape": shape + np.array([0, 8])}
    with pytest.raises(CheckpointError, match=r"weight_shape says \[1, 24\]"):
        LAYOUT.unpack(arrays, w(4, -1))


def test_an_unresolved_scheme_is_refused():
    with pytest.raises(SpecError, match="resolve_scheme"):
        LAYOUT.pack(Quantized(np.zeros((1, 8), np.int8), np.ones((1, 1), np.float32)), w(4, -1))

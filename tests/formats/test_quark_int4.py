from __future__ import annotations

import numpy as np
import pytest

from tensorsurgeon.formats.quark_int4 import QuarkInt4, pack_method
from tensorsurgeon.formats.registry import detect
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F32, I32
from tensorsurgeon.tensors.spec import TensorSpec
from tests.contract.formats import Case, FormatContract, Mutation, Refusal
from tests.contract.goldens import Golden, GoldenContract
from tests.contract.written_models import under, written

ORDER, REORDER = QuarkInt4("order"), QuarkInt4("reorder")
WEIGHT = TensorSpec("m.weight", BF16, (20, 160))
GENERAL = ("global_quant_config", "weight")
ZERO = ("weight_zero_point",)


def w(group_size: int, symmetric: bool = True) -> Scheme:
    return Scheme(num_bits=4, group_size=group_size, symmetric=symmetric, rule="quark")


class TestQuarkInt4(FormatContract):
    CASES = (
        Case(REORDER, w(32)),
        Case(ORDER, w(128)),
        Case(REORDER, w(32, symmetric=False)),
        Case(ORDER, w(32, symmetric=False)),
        Case(ORDER, w(-1), columns=8),
        Case(REORDER, w(-1, symmetric=False), columns=8),
    )
    REFUSALS = (
        Refusal(ORDER, WEIGHT, w(64), "group_size 64 does not divide in_features 160; use a divisor such as 40 or 80"),
        Refusal(ORDER, WEIGHT, Scheme(num_bits=8), "num_bits 4, found 8"),
    )
    MUTATIONS = (
        Mutation((*GENERAL, "dtype"), "int8", "dtype: found 'int8'"),
        Mutation((*GENERAL, "dtype"), "uint4", "symmetric: found True, can read False"),
        Mutation((*GENERAL, "qscheme"), "per_tensor", "qscheme: found 'per_tensor'"),
        Mutation((*GENERAL, "group_size"), None, "group_size: expected an integer"),
        Mutation(("export", "pack_method"), "order", "pack_method: found 'order', expected 'reorder'"),
    )


class TestQuarkInt4Golden(GoldenContract):
    GOLDENS = (
        *(
            Golden(f"quark-{kind}-{group}-{method}", QuarkInt4(method), w(size, kind == "int4"), ZERO if kind == "int4" else ())
            for kind in ("int4", "uint4")
            for group, size in (("g32", 32), ("g128", 128), ("channel", -1))
            for method in ("order", "reorder")
        ),
        Golden("quark_file-int4-channel", ORDER, w(-1)),
    )


@pytest.mark.parametrize(("layout", "word"), [(ORDER, 0xFEDCBA98), (REORDER, 0xFDB9ECA8)])
def test_int4_keeps_twos_complement_nibbles(layout, word):
    codes = np.repeat(np.arange(-8, 0, dtype=np.int8)[:, None], 32, 1)
    words, scale = layout.pack(Quantized(codes, np.ones((8, 1), np.float32)), layout.resolve_scheme(w(32), BF16))
    assert set(words.view(np.uint32).flat) == {word}
    assert (words.shape, scale.shape) == ((32, 1), (1, 8))


@pytest.mark.parametrize(("layout", "word"), [(ORDER, 0x76543210), (REORDER, 0x75316420)])
def test_uint4_codes_are_stored_with_8_added(layout, word):
    codes = np.repeat(np.arange(-8, 0, dtype=np.int8)[:, None], 32, 1)
    quantized = Quantized(codes, np.ones((8, 1), np.float32), np.full((8, 1), -8, np.int8))
    words, _, zeros = layout.pack(quantized, layout.resolve_scheme(w(32, symmetric=False), BF16))
    assert set(words.view(np.uint32).flat) == {word}
    assert zeros.tolist() == [[0]]


def test_outputs_that_fill_no_word_are_padded():
    assert ORDER.tensors(WEIGHT, w(32, symmetric=False)) == (
        TensorSpec("weight", I32, (160, 3)),
        TensorSpec("weight_scale", F32, (5, 20)),
        TensorSpec("weight_zero_point", I32, (5, 3)),
    )


def test_untransposed_scales_give_away_natural_order_whatever_the_config_says():
    """Quark 0.13's file-to-file writer packs in natural order and writes pack_method reorder."""
    model = written(REORDER, under(REORDER.resolve_scheme(w(32), BF16)))
    config = REORDER.config_files(model).quantization_config
    for name, spec in model.specs.items():
        if name.endswith("weight_scale"):
            model.specs[name] = spec._replace(shape=spec.shape[::-1])
    assert config["export"]["pack_method"] == "reorder"
    assert pack_method(config, model.specs) == "order"
    layout = detect({"quantization_config": config}, model.specs)
    assert layout == ORDER
    assert set(ORDER.read_config(config, model.specs)) == set(model.modules)


def test_untransposed_scales_are_read():
    rng = np.random.default_rng(0)
    quantized = Quantized(rng.integers(-8, 8, (16, 64)).astype(np.int8), rng.uniform(0.1, 1, (16, 2)).astype(np.float32))
    words, scale = ORDER.pack(quantized, ORDER.resolve_scheme(w(32), BF16))
    found = ORDER.unpack({"weight": words, "weight_scale": scale.T.copy()}, w(32))
    assert (found.codes == quantized.codes).all()
    assert (found.scale == quantized.scale).all()

import json
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorsurgeon.errors import NumericError, RecipeError, SpecError
from tensorsurgeon.ops.cast import Cast
from tests.checkpoints import apply, random_array, read_all, write_checkpoint
from tests.contract.ops import Case, OpContract, Refusal, spec_map

RNG = np.random.default_rng(0)
BF16 = np.dtype(ml_dtypes.bfloat16)
X = random_array(RNG, (5, 7), np.float32)
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 65504.0], np.float32)


def to(dtype, **fields):
    return Cast(where=("x",), dtype=dtype, **fields)


class TestCast(OpContract):
    CASES = (
        Case("f32_to_bf16", to("BF16"), {"x": X, "y": X}, {"x": X.astype(BF16), "y": X}, reversible=False),
        Case("f32_to_f16", to("F16"), {"x": X}, {"x": X.astype(np.float16)}, reversible=False),
        Case("bf16_to_f32", to("F32"), {"x": X.astype(BF16)}, {"x": X.astype(BF16).astype(np.float32)}, reversible=False),
        Case("f32_to_f8", to("F8_E4M3"), {"x": X}, {"x": X.astype(ml_dtypes.float8_e4m3fn)}, reversible=False),
        Case("integers", to("I32"), {"x": np.array([[-5, 7]], np.int64)}, {"x": np.array([[-5, 7]], np.int32)}, reversible=False),
        Case(
            "whole_floats_to_i8",
            to("I8"),
            {"x": np.array([-128.0, 127.0], np.float32)},
            {"x": np.array([-128, 127], np.int8)},
            reversible=False,
        ),
        Case("bool", to("BOOL"), {"x": np.array([0, 1], np.int8)}, {"x": np.array([False, True])}, reversible=False),
        Case("scalar", to("BF16"), {"x": np.asarray(1.5, np.float32)}, {"x": np.asarray(1.5, BF16)}, reversible=False),
        Case("empty", to("BF16"), {"x": np.zeros((0, 4), np.float32)}, {"x": np.zeros((0, 4), BF16)}, reversible=False),
        Case("infinities_and_nan_stay", to("F16"), {"x": SPECIAL}, {"x": SPECIAL.astype(np.float16)}, reversible=False),
        Case("already_there", to("F32"), {"x": X}, {"x": X}, reversible=False),
    )
    REFUSALS = (Refusal("complex", to("F32"), {"x": np.zeros((2,), np.complex64)}, SpecError, "C64"),)


@pytest.mark.parametrize(
    ("array", "dtype", "count"),
    [
        (np.array([1e5, 1.0, -1e6], np.float32), "F16", 2),
        (np.array([1e39], np.float64), "F32", 1),
        (np.array([500.0], np.float32), "F8_E4M3", 1),
        (np.array([1.5, 1.0], np.float32), "I8", 1),
        (np.array([128, -129, 3], np.int16), "I8", 2),
        (np.array([-1], np.int8), "U64", 1),
        (np.array([2.0**64], np.float32), "U64", 1),
        (np.array([np.nan, np.inf], np.float32), "I32", 2),
        (np.array([2], np.int8), "BOOL", 1),
        (np.array([2**53 + 1], np.int64), "BF16", 1),
    ],
)
def test_values_that_the_new_type_cannot_hold_stop_the_run_and_are_counted(array, dtype, count, tmp_path):
    source = write_checkpoint(tmp_path / "s", {"x": array})
    with pytest.raises(NumericError, match=rf"x: {count} "):
        apply(to(dtype), source, tmp_path / "t")


@given(
    st.lists(st.floats(width=64, allow_nan=False, allow_infinity=False, min_value=-1e30, max_value=1e30), min_size=1, max_size=50)
)
def test_float64_rounds_once_and_to_nearest_even(values):
    """Through float32, 1 + 2**-8 + 2**-40 would become a tie and round the wrong way."""
    array = np.array([*values, 1 + 2**-8 + 2**-40, -(1 + 2**-8 + 2**-40), 1 + 3 * 2**-8 - 2**-40], np.float64)
    op = to("BF16")
    (rewrite,) = op.plan(spec_map({"x": array}))
    (made,) = op.apply(rewrite, [array])
    every = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    finite = np.sort(every[np.isfinite(every.astype(np.float32))].astype(np.float64))
    for exact, rounded in zip(array, made.astype(np.float64), strict=True):
        place = np.searchsorted(finite, exact)
        near = [Fraction(finite[i]) for i in range(max(place - 2, 0), min(place + 2, finite.size))]
        assert abs(Fraction(rounded) - Fraction(exact)) == min(abs(n - Fraction(exact)) for n in near)


def test_a_large_tensor_is_cast_in_pieces_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorsurgeon.ops.cast._CHUNK_BYTES", 1000)
    x = random_array(RNG, (37, 3, 11), np.float32)
    source = write_checkpoint(tmp_path / "s", {"x": x, "v": x[:, 0, 0].copy()})
    apply(Cast(where=("{n}",), dtype="BF16"), source, tmp_path / "t", workers=3, max_ram_bytes=20_000)
    assert read_all(tmp_path / "t")["x"].tobytes() == x.astype(BF16).tobytes()


@pytest.mark.parametrize(("dtype", "message"), [("BF61", "BF16"), ("F4", "narrower than a byte"), ("F8_E8M0", "powers of two")])
def test_dtypes_that_cannot_be_are_refused_with_near_matches(dtype, message):
    with pytest.raises(RecipeError, match=message):
        to(dtype)


@pytest.mark.parametrize("where", [("{m*}",), ("maybe:a.weight",)])
def test_the_dtype_in_the_config_follows_a_cast_of_every_matrix(where, tmp_path):
    tensors = {name: np.ones((4, 4), ml_dtypes.bfloat16) for name in ("a.weight", "b.weight")}
    source = write_checkpoint(tmp_path / "s", tensors, config={"torch_dtype": "torch.bfloat16"})
    apply(Cast(where=where, dtype="F16"), source, tmp_path / "t")
    found = json.loads((tmp_path / "t" / "config.json").read_text())
    assert found["torch_dtype"] == ("torch.float16" if where == ("{m*}",) else "torch.bfloat16")

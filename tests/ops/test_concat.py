import pytest

from tensorsurgeon.errors import MissingTensorError, NoMatchError, RecipeError, SpecError
from tensorsurgeon.ops.concat import Concat
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import DTYPES, F32, bits

import numpy as np  # isort: skip

A, B, C = bits((2, 4)), bits((3, 4), seed=1), bits((1, 4), seed=2)
G, U = bits((3, 2, 5)), bits((3, 4, 5), seed=1)


class TestConcat(OpContract):
    CASES = (
        *(
            Case(
                f"rows_{d}",
                Concat(parts=("{p}.a", "{p}.b"), into="{p}.ab"),
                {"m.a": bits((2, 3), d), "m.b": bits((1, 3), d)},
                {"m.ab": np.concatenate([bits((2, 3), d), bits((1, 3), d)])},
            )
            for d in DTYPES
        ),
        *(
            Case(
                f"columns_{d}",
                Concat(parts=("a", "b"), into="ab", axis=-1),
                {"a": bits((2, 3), d), "b": bits((2, 1), d)},
                {"ab": np.concatenate([bits((2, 3), d), bits((2, 1), d)], axis=1)},
            )
            for d in DTYPES
        ),
        Case(
            "qkv_in_the_order_of_parts",
            Concat(parts=("c", "a", "b"), into="x"),
            {"a": A, "b": B, "c": C},
            {"x": np.concatenate([C, A, B])},
        ),
        Case(
            "middle_axis", Concat(parts=("g", "u"), into="gu", axis=1), {"g": G, "u": U}, {"gu": np.concatenate([G, U], axis=1)}
        ),
        Case(
            "vectors",
            Concat(parts=("a", "b"), into="x"),
            {"a": bits((2,)), "b": bits((3,))},
            {"x": np.concatenate([bits((2,)), bits((3,))])},
        ),
        Case("an_empty_part", Concat(parts=("a", "b"), into="x"), {"a": A[:0], "b": B}, {"x": B}),
        Case(
            "all_empty",
            Concat(parts=("a", "b"), into="x", axis=1),
            {"a": bits((0, 2, 3)), "b": bits((0, 1, 3))},
            {"x": bits((0, 3, 3))},
        ),
        Case(
            "empty_last_axis",
            Concat(parts=("a", "b"), into="x", axis=1),
            {"a": bits((2, 1, 0)), "b": bits((2, 2, 0))},
            {"x": bits((2, 3, 0))},
        ),
        Case("into_the_name_of_a_part", Concat(parts=("a", "b"), into="a"), {"a": A, "b": B}, {"a": np.concatenate([A, B])}),
    )
    REFUSALS = (
        Refusal(
            "a_part_is_missing",
            Concat(parts=("{p}.a", "{p}.b"), into="{p}.x"),
            {"m.a": A, "m.b": B, "n.a": A},
            MissingTensorError,
            "n.a has no counterpart",
        ),
        Refusal("no_second_part", Concat(parts=("a", "b"), into="x"), {"a": A}, NoMatchError, "'b'"),
        Refusal("shapes", Concat(parts=("a", "b"), into="x", axis=1), {"a": A, "b": B}, SpecError, "shape must agree"),
        Refusal(
            "dtypes",
            Concat(parts=("a", "b"), into="x"),
            {"a": A, "b": bits((2, 4), F32)},
            SpecError,
            "dtype and shape must agree",
        ),
        Refusal("scalars", Concat(parts=("a", "b"), into="x"), {"a": bits(()), "b": bits(())}, SpecError, "no axis 0"),
        Refusal(
            "nothing_tells_them_apart",
            Concat(parts=(r"re:.*\.a", r"re:.*\.b"), into="x"),
            {"m.a": A, "m.b": B, "n.a": A, "n.b": B},
            SpecError,
            "make the pattern capture",
        ),
    )


def test_one_part_is_no_concatenation():
    with pytest.raises(RecipeError, match="at least two"):
        Concat(parts=("a",), into="x")

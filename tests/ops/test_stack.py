import numpy as np
import pytest

from tensorsurgeon.errors import MissingTensorError, RecipeError, SpecError
from tensorsurgeon.ops.stack import Stack
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import DTYPES, F32, bits


def numbered(count, shape, dtype="bfloat16", template="e.{}.w"):
    import ml_dtypes

    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return {template.format(i): bits(shape, dtype, seed=i) for i in range(count)}


def stacked(parts):
    return np.stack(list(parts.values()))


OP = Stack(where=("{p}.{index}.w",), into="{p}.w")


class TestStack(OpContract):
    CASES = (
        *(Case(f"any_dtype_{d}", OP, numbered(3, (2, 2), d), {"e.w": stacked(numbered(3, (2, 2), d))}) for d in DTYPES),
        Case("twelve_in_order_of_number_not_of_text", OP, numbered(12, (1, 3)), {"e.w": stacked(numbered(12, (1, 3)))}),
        Case("one", OP, numbered(1, (2, 3)), {"e.w": stacked(numbered(1, (2, 3)))}),
        Case("vectors", OP, numbered(2, (3,)), {"e.w": stacked(numbered(2, (3,)))}),
        Case("three_axes", OP, numbered(2, (2, 3, 2)), {"e.w": stacked(numbered(2, (2, 3, 2)))}),
        Case("empty", OP, numbered(2, (0, 3)), {"e.w": bits((2, 0, 3))}),
        Case(
            "two_stacks",
            OP,
            {**numbered(2, (2, 2)), **numbered(3, (1, 2), template="f.{}.w")},
            {"e.w": stacked(numbered(2, (2, 2))), "f.w": stacked(numbered(3, (1, 2), template="f.{}.w"))},
        ),
        Case(
            "by_regex",
            Stack(where=(r"re:(?P<p>.+)\.(?P<index>\d+)\.w",), into="{p}.s"),
            numbered(2, (2, 2)),
            {"e.s": stacked(numbered(2, (2, 2)))},
        ),
    )
    REFUSALS = (
        Refusal("a_gap", OP, {"e.0.w": bits((2, 2)), "e.2.w": bits((2, 2))}, MissingTensorError, "number 1 of 2 is missing"),
        Refusal("not_a_number", OP, {"e.x.w": bits((2, 2))}, SpecError, "must be a number, found 'x'"),
        Refusal("shapes", OP, {"e.0.w": bits((2, 2)), "e.1.w": bits((2, 3))}, SpecError, "must agree"),
        Refusal("dtypes", OP, {"e.0.w": bits((2, 2)), "e.1.w": bits((2, 2), F32)}, SpecError, "must agree"),
        Refusal("scalars", OP, {"e.0.w": bits(())}, SpecError, "scalars cannot be stacked"),
        Refusal(
            "same_number_twice", OP, {"e.1.w": bits((2,)), "e.01.w": bits((2,)), "e.0.w": bits((2,))}, SpecError, "both number 1"
        ),
        Refusal(
            "layers_not_told_apart",
            Stack(where=(r"re:layers\.\d+\.(?P<index>\d+)",), into="s"),
            {"layers.0.0": bits((2,)), "layers.1.0": bits((2,))},
            SpecError,
            "both number 0",
        ),
    )


def test_a_stack_needs_the_field_that_numbers():
    with pytest.raises(RecipeError, match=r"\{index\}"):
        Stack(where=("{p}.{e}.w",), into="x")

import numpy as np

from tensorsurgeon.errors import SpecError
from tensorsurgeon.ops.transpose import Transpose
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import DTYPES, bits


class TestTranspose(OpContract):
    CASES = (
        *(Case(f"matrix_{d}", Transpose(where=("x",)), {"x": bits((4, 3), d)}, {"x": bits((4, 3), d).T}) for d in DTYPES),
        Case("last_two", Transpose(where=("x",)), {"x": bits((2, 3, 4))}, {"x": bits((2, 3, 4)).swapaxes(1, 2)}),
        Case("cycle", Transpose(where=("x",), axes=(1, 2, 0)), {"x": bits((2, 3, 4))}, {"x": bits((2, 3, 4)).transpose(1, 2, 0)}),
        Case("identity_of_a_vector", Transpose(where=("x",), axes=(0,)), {"x": bits((5,))}, {"x": bits((5,))}),
        Case("scalar", Transpose(where=("x",), axes=()), {"x": bits(())}, {"x": bits(())}),
        Case("empty", Transpose(where=("x",)), {"x": bits((0, 3))}, {"x": bits((3, 0))}),
        Case(
            "others_stay",
            Transpose(where=("{x}",), exclude=("y",)),
            {"x": bits((2, 3)), "y": bits((2, 3))},
            {"x": bits((2, 3)).T, "y": bits((2, 3))},
        ),
    )
    REFUSALS = (
        Refusal("vector", Transpose(where=("x",)), {"x": bits((4,))}, SpecError, "1 axes cannot"),
        Refusal("no_permutation", Transpose(where=("x",), axes=(0, 0)), {"x": bits((4, 2))}, SpecError, "no permutation"),
        Refusal("wrong_rank", Transpose(where=("x",), axes=(1, 0)), {"x": bits((4, 2, 2))}, SpecError, "no permutation"),
    )


def test_twice_is_nothing_also_through_one_plan(tmp_path):
    from tests.checkpoints import apply, assert_same, read_all, write_checkpoint

    x = bits((3, 5), np.float32)
    source = write_checkpoint(tmp_path / "s", {"x": x})
    apply([Transpose(where=("x",)), Transpose(where=("x",))], source, tmp_path / "t")
    assert_same(read_all(tmp_path / "t"), {"x": x})

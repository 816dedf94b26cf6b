import ml_dtypes
import numpy as np
import pytest

from tensorsurgeon.errors import NoMatchError, NumericError
from tensorsurgeon.ops.drop import Drop
from tests.checkpoints import apply, write_checkpoint
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import F32, bits

A, B = bits((3, 4)), bits((), F32)
ZEROS = {
    "z.i8": np.zeros((3, 2), np.int8),
    "z.bf16": np.zeros((4,), ml_dtypes.bfloat16),
    "z.minus": np.full((2,), -0.0, np.float32),
    "z.s": np.zeros((), np.int32),
    "z.e": np.zeros((0, 2), np.float16),
}


class TestDrop(OpContract):
    CASES = (
        Case("always", Drop(where=("a",)), {"a": A, "b": B}, {"b": B}, reversible=False),
        Case("zeros_of_every_kind", Drop(where=("z.{x}",), only_if="zero"), {"a": A, **ZEROS}, {"a": A}, reversible=False),
        Case("exclude", Drop(where=("{x}",), exclude=("b",)), {"a": A, "b": B}, {"b": B}, reversible=False),
    )
    REFUSALS = (Refusal("nothing", Drop(where=("zz",)), {"a": A}, NoMatchError, "'zz'"),)


@pytest.mark.parametrize("value", [np.int8(1), np.float32("nan"), np.float32(1e-45), ml_dtypes.bfloat16(-1)])
def test_what_is_not_zero_is_never_dropped_as_zero(value, tmp_path):
    array = np.zeros((3, 3), np.asarray(value).dtype)
    array[2, 1] = value
    source = write_checkpoint(tmp_path / "s", {"zp": array, "a": A})
    with pytest.raises(NumericError, match="zp: expected zeros only, found 1 other"):
        apply(Drop(where=("zp",), only_if="zero"), source, tmp_path / "t")

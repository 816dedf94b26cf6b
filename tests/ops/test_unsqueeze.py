from tensorsurgeon.errors import SpecError
from tensorsurgeon.ops.unsqueeze import Unsqueeze
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import DTYPES, bits


class TestUnsqueeze(OpContract):
    CASES = (
        *(Case(f"scales_{d}", Unsqueeze(where=("s",)), {"s": bits((5,), d)}, {"s": bits((5,), d)[:, None]}) for d in DTYPES),
        Case("first", Unsqueeze(where=("s",), axis=0), {"s": bits((5, 2))}, {"s": bits((5, 2))[None]}),
        Case("negative", Unsqueeze(where=("s",), axis=-2), {"s": bits((5, 2))}, {"s": bits((5, 2))[:, None]}),
        Case("scalar", Unsqueeze(where=("s",)), {"s": bits(())}, {"s": bits(())[None]}),
        Case("empty", Unsqueeze(where=("s",), axis=1), {"s": bits((0, 3))}, {"s": bits((0, 3))[:, None]}),
    )
    REFUSALS = (
        Refusal("too_far", Unsqueeze(where=("s",), axis=3), {"s": bits((5, 2))}, SpecError, "no place 3"),
        Refusal("too_far_back", Unsqueeze(where=("s",), axis=-4), {"s": bits((5, 2))}, SpecError, "no place -4"),
    )

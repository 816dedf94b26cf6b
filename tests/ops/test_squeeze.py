from tensorsurgeon.errors import SpecError
from tensorsurgeon.ops.squeeze import Squeeze
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import DTYPES, bits


class TestSqueeze(OpContract):
    CASES = (
        *(Case(f"scales_{d}", Squeeze(where=("s",)), {"s": bits((5, 1), d)}, {"s": bits((5, 1), d)[:, 0]}) for d in DTYPES),
        Case("first_axis", Squeeze(where=("s",), axis=0), {"s": bits((1, 2, 1))}, {"s": bits((1, 2, 1))[0]}),
        Case("negative_axis", Squeeze(where=("s",), axis=-2), {"s": bits((2, 1, 3))}, {"s": bits((2, 1, 3))[:, 0]}),
        Case("to_scalar", Squeeze(where=("s",)), {"s": bits((1,))}, {"s": bits((1,)).reshape(())}),
        Case("empty", Squeeze(where=("s",)), {"s": bits((0, 1))}, {"s": bits((0,))}),
        Case(
            "if_unit_leaves_others",
            Squeeze(where=("{s}",), if_unit=True),
            {"s": bits((2, 2)), "t": bits((1,)), "u": bits((2, 1))},
            {"s": bits((2, 2)), "t": bits((1,)), "u": bits((2, 1))[:, 0]},
        ),
    )
    REFUSALS = (
        Refusal("not_of_size_one", Squeeze(where=("s",)), {"s": bits((5, 2))}, SpecError, "[5, 2] has no axis -1 of size 1"),
        Refusal("no_such_axis", Squeeze(where=("s",), axis=2), {"s": bits((5, 1))}, SpecError, "no axis 2"),
        Refusal("scalar", Squeeze(where=("s",)), {"s": bits(())}, SpecError, "[] has no axis"),
    )

from tensorsurgeon.errors import NoMatchError
from tensorsurgeon.ops.keep import Keep
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import F32, bits

A, B, C = bits((3, 4)), bits((), F32), bits((0,))


class TestKeep(OpContract):
    CASES = (
        Case("some", Keep(where=("a", "c")), {"a": A, "b": B, "c": C}, {"a": A, "c": C}, reversible=False),
        Case("all_but", Keep(where=("{x}",), exclude=("a",)), {"a": A, "b": B}, {"b": B}, reversible=False),
        Case("everything", Keep(where=("{x}",)), {"a": A, "b": B}, {"a": A, "b": B}, reversible=False),
    )
    REFUSALS = (Refusal("nothing", Keep(where=("d",)), {"a": A}, NoMatchError, "'d'"),)

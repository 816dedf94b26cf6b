from tensorsurgeon.errors import NameCollisionError, SpecError
from tensorsurgeon.ops.unstack import Unstack
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import DTYPES, bits

OP = Unstack(where=("{p}.w",), into=("{p}.{index}.weight",))


def unstacked(whole):
    return {f"e.{i}.weight": part for i, part in enumerate(whole)}


class TestUnstack(OpContract):
    CASES = (
        *(Case(f"experts_{d}", OP, {"e.w": bits((3, 2, 4), d)}, unstacked(bits((3, 2, 4), d))) for d in DTYPES),
        Case("rows", OP, {"e.w": bits((11, 4))}, unstacked(bits((11, 4)))),
        Case("one", OP, {"e.w": bits((1, 2, 2))}, unstacked(bits((1, 2, 2)))),
        Case("four_axes", OP, {"e.w": bits((2, 2, 3, 2))}, unstacked(bits((2, 2, 3, 2)))),
        Case("empty_slices", OP, {"e.w": bits((2, 0, 3))}, unstacked(bits((2, 0, 3)))),
        Case(
            "gate_and_up",
            Unstack(where=("{p}.gate_up",), into=("{p}.{index}.gate", "{p}.{index}.up")),
            {"e.gate_up": bits((3, 4, 5))},
            {f"e.{i}.{part}": bits((3, 4, 5))[i, 2 * k : 2 * k + 2] for i in range(3) for k, part in enumerate(("gate", "up"))},
        ),
        Case(
            "exclude",
            Unstack(where=("{p}.w",), into=("{p}.{index}",), exclude=("f.w",)),
            {"e.w": bits((2, 2)), "f.w": bits((2, 2))},
            {"e.0": bits((2, 2))[0], "e.1": bits((2, 2))[1], "f.w": bits((2, 2))},
        ),
    )
    REFUSALS = (
        Refusal("vector", OP, {"e.w": bits((3,))}, SpecError, "two axes are needed"),
        Refusal(
            "uneven_parts",
            Unstack(where=("{p}.w",), into=("{p}.{index}.a", "{p}.{index}.b")),
            {"e.w": bits((2, 3, 4))},
            SpecError,
            "cannot be cut into 2 equal parts",
        ),
        Refusal("no_slices", OP, {"e.w": bits((0, 2, 2))}, SpecError, "empty first axis"),
        Refusal(
            "no_number_in_the_name",
            Unstack(where=("{p}.w",), into=("{p}.x",)),
            {"e.w": bits((2, 2))},
            NameCollisionError,
            "two rewrites make a tensor",
        ),
    )

import numpy as np
import pytest

from tensorsurgeon.errors import NameCollisionError, RecipeError, SpecError
from tensorsurgeon.ops.split import Split
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import DTYPES, bits

QKV = bits((9, 4))
GATE_UP = bits((3, 4, 5))


class TestSplit(OpContract):
    CASES = (
        *(
            Case(
                f"gate_first_half_{d}",
                Split(where=("{p}.gate_up",), into=("{p}.gate", "{p}.up"), axis=1),
                {"e.gate_up": bits((3, 4, 5), d)},
                {"e.gate": bits((3, 4, 5), d)[:, :2], "e.up": bits((3, 4, 5), d)[:, 2:]},
            )
            for d in DTYPES
        ),
        *(
            Case(
                f"columns_{d}",
                Split(where=("x",), into=("a", "b"), axis=-1, sizes=(3, 1)),
                {"x": bits((2, 4), d)},
                {"a": bits((2, 4), d)[:, :3], "b": bits((2, 4), d)[:, 3:]},
            )
            for d in DTYPES
        ),
        Case(
            "unequal_qkv",
            Split(where=("qkv",), into=("q", "k", "v"), sizes=(5, 2, 2)),
            {"qkv": QKV},
            {"q": QKV[:5], "k": QKV[5:7], "v": QKV[7:]},
        ),
        Case(
            "vector",
            Split(where=("b",), into=("x", "y", "z")),
            {"b": bits((6,))},
            {"x": bits((6,))[:2], "y": bits((6,))[2:4], "z": bits((6,))[4:]},
        ),
        Case(
            "first_of_three_axes",
            Split(where=("x",), into=("a", "b"), sizes=(1, 2)),
            {"x": GATE_UP},
            {"a": GATE_UP[:1], "b": GATE_UP[1:]},
        ),
        Case(
            "last_of_three_axes",
            Split(where=("x",), into=("a", "b"), axis=2, sizes=(2, 3)),
            {"x": GATE_UP},
            {"a": GATE_UP[..., :2], "b": GATE_UP[..., 2:]},
        ),
        Case(
            "one_slice_only",
            Split(where=("x",), into=("a", "b"), axis=1),
            {"x": GATE_UP[:1]},
            {"a": GATE_UP[:1, :2], "b": GATE_UP[:1, 2:]},
        ),
        Case(
            "a_part_of_size_zero",
            Split(where=("x",), into=("a", "b"), axis=1, sizes=(0, 4)),
            {"x": GATE_UP},
            {"a": GATE_UP[:, :0], "b": GATE_UP},
        ),
        Case(
            "zero_in_the_middle",
            Split(where=("x",), into=("a", "b", "c"), sizes=(4, 0, 5)),
            {"x": QKV},
            {"a": QKV[:4], "b": QKV[4:4], "c": QKV[4:]},
        ),
        Case(
            "nothing_along_the_outer_axis",
            Split(where=("x",), into=("a", "b"), axis=1),
            {"x": bits((0, 4, 3))},
            {"a": bits((0, 2, 3)), "b": bits((0, 2, 3))},
        ),
        Case(
            "nothing_along_the_last_axis",
            Split(where=("x",), into=("a", "b"), axis=1),
            {"x": bits((2, 4, 0))},
            {"a": bits((2, 2, 0)), "b": bits((2, 2, 0))},
        ),
        Case(
            "four_axes",
            Split(where=("x",), into=("a", "b"), axis=1),
            {"x": bits((2, 2, 3, 2))},
            {"a": bits((2, 2, 3, 2))[:, :1], "b": bits((2, 2, 3, 2))[:, 1:]},
        ),
    )
    REFUSALS = (
        Refusal("uneven", Split(where=("x",), into=("a", "b")), {"x": QKV}, SpecError, "does not divide into 2 equal parts"),
        Refusal(
            "sizes_do_not_add_up",
            Split(where=("x",), into=("a", "b"), sizes=(4, 4)),
            {"x": QKV},
            SpecError,
            "add up to 8, but axis 0 of [9, 4] has 9",
        ),
        Refusal("no_axis", Split(where=("x",), into=("a", "b"), axis=2), {"x": QKV}, SpecError, "no axis 2"),
        Refusal("scalar", Split(where=("x",), into=("a", "b")), {"x": bits(())}, SpecError, "no axis 0"),
        Refusal(
            "equal_names", Split(where=("x",), into=("a", "a"), sizes=(4, 5)), {"x": QKV}, NameCollisionError, "a: two rewrites"
        ),
        Refusal(
            "onto_another",
            Split(where=("x",), into=("y", "z"), sizes=(4, 5)),
            {"x": QKV, "y": QKV},
            NameCollisionError,
            "one exists and stays",
        ),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"into": ("a",)}, "at least two"),
        ({"into": ("a", "b"), "sizes": (1,)}, "1 sizes for 2"),
        ({"into": ("a", "b"), "sizes": (-1, 5)}, "negative"),
    ],
)
def test_impossible_splits_are_refused_before_any_tensor_is_seen(fields, message):
    with pytest.raises(RecipeError, match=message):
        Split(where=("x",), **fields)


def test_gate_up_becomes_copies_of_the_source_and_no_array(tmp_path):
    """Splitting a gigabyte of experts may cost no memory: pass-through bytes never become tensors."""
    from tensorsurgeon.checkpoint.folder import open_checkpoint
    from tensorsurgeon.planning.plan import make_plan
    from tests.checkpoints import write_checkpoint

    source = write_checkpoint(tmp_path / "s", {"e.gate_up": np.zeros((8, 6, 4), np.float32)})
    plan = make_plan(Split(where=("e.gate_up",), into=("g", "u"), axis=1), open_checkpoint(source))
    assert not any(unit.tasks for unit in plan.units)
    assert plan.copied_bytes == 8 * 6 * 4 * 4

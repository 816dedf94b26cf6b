from tensorsurgeon.errors import NameCollisionError, NoMatchError, RecipeError
from tensorsurgeon.ops.rename import Rename
from tests.contract.ops import Case, OpContract, Refusal
from tests.ops.arrays import DTYPES, F32, bits

A, B = bits((3, 4)), bits((3, 4), seed=1)


class TestRename(OpContract):
    CASES = (
        *(
            Case(
                f"any_dtype_{dtype}",
                Rename(where=("m.{p*}.a",), to="{p}.b"),
                {"m.x.y.a": bits((2, 3), dtype)},
                {"x.y.b": bits((2, 3), dtype)},
            )
            for dtype in DTYPES
        ),
        Case(
            "scalar_and_empty",
            Rename(where=("{a}",), to="new.{a}"),
            {"s": bits((), F32), "e": bits((0, 3))},
            {"new.s": bits((), F32), "new.e": bits((0, 3))},
        ),
        Case("exclude", Rename(where=("{a}",), to="new.{a}", exclude=("b",)), {"a": A, "b": B}, {"new.a": A, "b": B}),
        Case(
            "two_change_places",
            Rename(where=("re:(?P<first>[ab])(?P<rest>)",), to="{first}x{rest}"),
            {"a": A, "b": B},
            {"ax": A, "bx": B},
        ),
        Case(
            "regex_fields",
            Rename(where=(r"re:layers\.(?P<n>\d+)\.w",), to="blk.{n}.weight"),
            {"layers.10.w": A, "layers.2.w": B},
            {"blk.10.weight": A, "blk.2.weight": B},
        ),
        Case("takes_a_name_that_leaves", Rename(where=("{x}.a",), to="{x}.a.a"), {"q.a": A}, {"q.a.a": A}),
        Case("nothing_changes", Rename(where=("{a}",), to="{a}"), {"a": A}, {"a": A}),
        Case("may_be_absent", Rename(where=("maybe:zzz.{a}",), to="{a}"), {"a": A}, {"a": A}),
        Case("unicode", Rename(where=("{a}",), to="ä.{a}.日本"), {"a": A}, {"ä.a.日本": A}),
    )
    REFUSALS = (
        Refusal(
            "nothing_matches", Rename(where=("model.{a}.wieght",), to="x"), {"model.a.weight": A}, NoMatchError, "model.a.weight"
        ),
        Refusal("two_to_one_name", Rename(where=("{a}",), to="same"), {"a": A, "b": B}, NameCollisionError, "same"),
        Refusal(
            "onto_a_name_that_stays", Rename(where=("a",), to="b"), {"a": A, "b": B}, NameCollisionError, "one exists and stays"
        ),
        Refusal("unknown_field", Rename(where=("{a}",), to="{b}"), {"a": A}, RecipeError, "{a}"),
        Refusal("stray_brace", Rename(where=("{a}",), to="{a"), {"a": A}, RecipeError, "braces"),
        Refusal("group_without_text", Rename(where=("re:(?P<x>q)?a",), to="{x}"), {"a": A}, RecipeError, "does not define"),
        Refusal("name_of_the_metadata", Rename(where=("a",), to="__metadata__"), {"a": A}, NameCollisionError, "__metadata__"),
        Refusal("empty_name", Rename(where=(r"re:a(?P<rest>.*)",), to="{rest}"), {"a": A}, NameCollisionError, "''"),
        Refusal("all_excluded", Rename(where=("{a}",), to="x.{a}", exclude=("{b}",)), {"a": A}, NoMatchError, "excluded"),
    )

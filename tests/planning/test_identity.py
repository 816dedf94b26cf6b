"""A step's identity: the same in every process, another for every setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tensorsurgeon.errors import RecipeError
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.planning.identity import step_identity


class Bare:
    """Says nothing of itself."""


@dataclass(frozen=True)
class Step:
    setting: Any
    how: Any = field(default=None, metadata={"recipe": False})

    def plan(self, specs):
        return ()

    def apply(self, rewrite, inputs):
        return ()


class Named(Step):
    def identity(self) -> str:
        return "by name"


@dataclass(frozen=True)
class Inner:
    value: Any


LONG = np.arange(5000, dtype=np.float32)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LONG, np.where(np.arange(5000) == 2500, 0, LONG).astype(np.float32)),
        (LONG, LONG.astype(np.float64)),
        (LONG, LONG.reshape(50, 100)),
        ((1, 2), (1, 3)),
        ("1", 1),
        (Inner(LONG), Inner(LONG[::-1])),
        ({"a": LONG}, {"a": LONG + 1}),
        (b"a", "a"),
        (np.float32(0.1), np.float32(0.2)),
    ],
)
def test_other_settings_are_another_step(one: Any, other: Any) -> None:
    assert step_identity(Step(one)) != step_identity(Step(other))
    assert step_identity(Step(one)) == step_identity(Step(one))
    assert "0x" not in step_identity(Step(one))


def test_how_something_is_computed_is_no_part_of_it() -> None:
    assert step_identity(Step(1, how=Bare())) == step_identity(Step(1))
    one, other = (Quantize(where=("a",), format="ct-int", backend=backend) for backend in ("fast", "torch"))
    assert step_identity(one) == step_identity(other)


@pytest.mark.parametrize("setting", [Bare(), Inner(Bare()), [Bare()], {"a": (Bare(),)}, lambda x: x])
def test_a_setting_without_words_is_refused_by_its_name(setting: Any) -> None:
    with pytest.raises(RecipeError, match=r"Step\.setting.*: a \w+ says no settings"):
        step_identity(Step(setting))


def test_a_step_may_say_itself_what_it_is() -> None:
    assert step_identity(Named(Bare())) == "Named by name"


def test_sets_have_one_order() -> None:
    assert step_identity(Step({"b", "a", "c"})) == step_identity(Step({"c", "b", "a"}))

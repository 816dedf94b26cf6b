"""A field of the wrong type is told as what it is, in Python as in YAML, whatever op and whatever value; lists do for tuples."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import RecipeError, SurgeonError
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.ops.registry import OPS, op_named
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.recipes.recipe import make_op
from tests.checkpoints import moe_config, tiny_moe, write_checkpoint

NEEDED: dict[str, dict[str, Any]] = {
    "cast": {"where": ("{p*}.norm.weight",), "dtype": "F32"},
    "concat": {"parts": ("a", "b"), "into": "c", "axis": 0},
    "drop": {"where": ("{p*}.gate.weight",)},
    "expect": {"where": ("{p*}.gate.weight",), "shape": ("a", "b")},
    "keep": {"where": ("{p*}",)},
    "quantize": {"where": ("{p*}_proj.weight",), "format": "ct-packed"},
    "rename": {"where": ("{p*}.gate.weight",), "to": "{p}.router.weight"},
    "repack": {"to": "awq"},
    "reshape": {"where": ("{p*}.gate.weight",), "shape": (-1,)},
    "split": {"where": ("{p*}.gate.weight",), "into": ("a", "b"), "axis": 0},
    "squeeze": {"where": ("{p*}.gate.weight",), "axis": 0},
    "stack": {"where": ("{p*}.layers.{n}.input_layernorm.weight",), "into": "{p}.x"},
    "transpose": {"where": ("{p*}.gate.weight",)},
    "unsqueeze": {"where": ("{p*}.gate.weight",), "axis": 0},
    "unstack": {"where": ("{p*}.gate.weight",), "into": ("{p}.{i}",)},
}
VALUES: list[Any] = [
    None, 0, 1, -1, 2.5, float("nan"), 10**400, 10**5000, "x", "", "{", "re:(", "\ud800", b"x", True, [], (), ["x"], ("re:(",),
    [["x"]], (1,), [None], {"a": 1}, {1}, object(),
]  # fmt: skip
FIELDS = [
    (name, field.name)
    for name, target in OPS.items()
    for field in dataclasses.fields(getattr(import_module(target.partition(":")[0]), target.partition(":")[2]))
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("fields") / "source", tiny_moe(), config=moe_config())


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_any_value_is_taken_or_told(name: str, field: str, source: Path) -> None:
    checkpoint = open_checkpoint(source)
    refused = 0
    for value in VALUES:
        fields = {**NEEDED.get(name, {}), field: value}
        for make in (lambda: op_named(name)(**fields), lambda: make_op(name, fields)):  # noqa: B023  # called at once
            try:
                make_plan(make(), checkpoint)
            except SurgeonError:
                refused += 1
    assert refused >= 2


def test_lists_do_for_tuples_and_a_word_for_one(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    patterns = ("{p*}.self_attn.{x}_proj.weight", "maybe:{p*}.none")
    as_list = Quantize(where=[*patterns], format="ct-packed", group_size=8)  # type: ignore[arg-type]
    as_tuple = Quantize(where=patterns, format="ct-packed", group_size=8)
    assert as_list == as_tuple
    assert make_plan(as_list, checkpoint).fingerprint == make_plan(as_tuple, checkpoint).fingerprint
    assert Quantize(where=patterns[0], format="ct-packed").where == patterns[:1]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("where", {1}, "quantize: where must be a word, found {1}"),
        ("group_size", "32", "quantize: group_size must be a whole number, found '32'"),
        ("symmetric", 1, "quantize: symmetric must be true or false, found 1"),
        ("method", "gtpq", "quantize: method must be one of rtn, imatrix, gptq, signround, found 'gtpq'"),
        ("block", (128, None), "quantize: block must be a whole number, found None"),
    ],
)
def test_the_message_names_op_and_field(field: str, value: Any, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        Quantize(**{**NEEDED["quantize"], field: value})
    assert str(error.value) == words

"""Ops that undo each other: there and back is every byte where it was, in two runs and within one plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.ops.concat import Concat
from tensorsurgeon.ops.expect import Expect
from tensorsurgeon.ops.registry import OPS, op_named
from tensorsurgeon.ops.rename import Rename
from tensorsurgeon.ops.reshape import Reshape
from tensorsurgeon.ops.split import Split
from tensorsurgeon.ops.split_experts import SplitExperts
from tensorsurgeon.ops.squeeze import Squeeze
from tensorsurgeon.ops.stack import Stack
from tensorsurgeon.ops.stack_experts import StackExperts
from tensorsurgeon.ops.transpose import Transpose
from tensorsurgeon.ops.unsqueeze import Unsqueeze
from tensorsurgeon.ops.unstack import Unstack
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.planning.rewriting import is_reversible
from tensorsurgeon.running.run import run_plan
from tests.checkpoints import assert_same, read_all, write_checkpoint
from tests.ops.arrays import DTYPES, bits

# What goes there, what comes back, and the shape of the tensor ``x`` that both meet.
PAIRS: list[tuple[Any, Any, tuple[int, ...]]] = [
    (Rename(where=("x",), to="y"), Rename(where=("y",), to="x"), (3, 4)),
    (Reshape(where=("x",), shape=(2, -1)), Reshape(where=("x",), shape=(3, 4)), (3, 4)),
    (Squeeze(where=("x",), axis=1), Unsqueeze(where=("x",), axis=1), (3, 1, 2)),
    (Split(where=("x",), into=("a", "b"), sizes=(1, 3)), Concat(parts=("a", "b"), into="x"), (4, 3)),
    (Split(where=("x",), into=("a", "b"), axis=1), Concat(parts=("a", "b"), into="x", axis=1), (3, 4, 2)),
    (Split(where=("x",), into=("a", "b"), axis=-1, sizes=(3, 1)), Concat(parts=("a", "b"), into="x", axis=-1), (3, 4)),
    (Split(where=("x",), into=("a", "b"), axis=2), Concat(parts=("a", "b"), into="x", axis=2), (2, 3, 4)),
    (Unstack(where=("x",), into=("x.{index}",)), Stack(where=("x.{index}",), into="x"), (12, 2, 3)),
    (
        Unstack(where=("x",), into=("{index}.gate", "{index}.up")),
        [Concat(parts=("{i}.gate", "{i}.up"), into="{i}.x"), Stack(where=("{index}.x",), into="x")],
        (3, 4, 2),
    ),
    (Transpose(where=("x",)), Transpose(where=("x",)), (2, 3, 4)),
    (Transpose(where=("x",), axes=(1, 2, 0)), Transpose(where=("x",), axes=(2, 0, 1)), (2, 3, 4)),
    (Expect(where=("x",), shape=("any", "2")), Expect(where=("x",), shape=("3", "any")), (3, 2)),
]


# Shown with models whose experts are stacked, in test_stack_experts.py.
SHOWN_ELSEWHERE = {SplitExperts, StackExperts}


def name_of(value: object) -> str:
    return type(value).__name__ if is_op(value) else ""


def is_op(value: object) -> bool:
    return hasattr(value, "plan")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("there", "back", "shape"), PAIRS, ids=name_of)
def test_there_and_back_is_every_byte_where_it_was(there, back, shape, dtype, tmp_path: Path) -> None:
    tensors = {"x": bits(shape, dtype), "other": bits((5,))}
    source = write_checkpoint(tmp_path / "source", tensors)
    run_plan(make_plan(there, open_checkpoint(source)), tmp_path / "there")
    run_plan(make_plan(back, open_checkpoint(tmp_path / "there")), tmp_path / "back")
    assert_same(read_all(tmp_path / "back"), tensors)
    run_plan(make_plan([there, back], open_checkpoint(source)), tmp_path / "at_once")
    assert_same(read_all(tmp_path / "at_once"), tensors)


def test_every_op_that_says_it_can_be_undone_is_shown_to_be() -> None:
    shown = {type(op) for there, back, _ in PAIRS for op in (there, *(back if isinstance(back, list) else [back]))}
    assert shown | SHOWN_ELSEWHERE == {cls for cls in map(op_named, OPS) if is_reversible(object.__new__(cls))}

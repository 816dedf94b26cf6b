"""What lies beside a checkpoint is a stranger's too: one clear error, and no traceback, whatever it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tensorsurgeon.checkpoint.forms import require_form
from tensorsurgeon.cli import main
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.publish.made import read_made
from tests.checkpoints import FIXTURE

ODD: tuple[Any, ...] = (None, 5, "x", [], {}, [[]], -1e308, True, "\ud800", "a\n\x1b[2J", 10**400)
NAMES = ("surgeon_plan.json", "evaluation.json", "verification.json", "quant_log.csv", "surgeon.json", "README.md")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    assert CliRunner().invoke(main, ["apply", "quark-w8a8-int8", str(FIXTURE), str(folder), "-q"]).exit_code == 0
    return folder


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(tree, dict | list):
        keys = list(tree)[:3] if isinstance(tree, dict) else range(min(len(tree), 2))
        for key in keys:
            yield from places(tree[key], (*path, key))


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = tree.copy()
    copy[path[0]] = put(copy[path[0]], path[1:], value)
    return copy


def test_every_value_of_the_plan_is_looked_at_before_it_is_believed(made: Path, tmp_path: Path) -> None:
    document = json.loads((made / "surgeon_plan.json").read_text())
    path = tmp_path / "surgeon_plan.json"
    accepted = 0
    for place in places(document):
        for value in ODD:
            path.write_text(json.dumps(put(document, place, value)))
            try:
                found = read_made(tmp_path)
            except CheckpointError:
                continue
            accepted += 1
            # What is believed is of a kind with what was there, or a number that may be missing.
            inner: Any = found
            for key in place:
                inner = inner[key]
            assert inner == value
    # Text for text, a number for a number, an empty list for a list: a twentieth or so.
    assert accepted


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "content", [b"", b"[" * 200_000, b"[1, [2]]", b'"x"', b"\xff\x00" * 99, b"---\n- 1\n---\n", b"---\na: 2020-99-99\n---\n"]
)
def test_damaged_files_beside_a_checkpoint_end_in_no_traceback(content: bytes, name: str, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(made, folder)
    (folder / name).write_bytes(content)
    for command in ("card", "page", "verify", "inspect"):
        result = CliRunner().invoke(main, [command, str(folder)])
        assert isinstance(result.exception, SystemExit | None), (command, result.exception)
        assert result.exit_code not in (1, 70), (command, result.output)


@pytest.mark.parametrize(
    ("value", "form"),
    [(True, int), (1.5, int), (float("inf"), float), ("\ud800", str), ([], [int, 1]), ([1, "x"], [int]), ({"a": 1}, {"b": int}),
     ({"a": "x"}, {str: int}), (3, (str, None)), ([], {str: int})],
)  # fmt: skip
def test_a_value_of_another_form_is_refused(value: Any, form: Any) -> None:
    with pytest.raises(ValueError, match="it"):
        require_form(value, form)


@pytest.mark.parametrize(
    ("value", "form"), [(1, float), (None, (int, None)), ({}, {"a?": int}), ([[1]], [[int]]), ({"x": "ü"}, {str: str})]
)
def test_a_value_of_its_form_is_taken(value: Any, form: Any) -> None:
    require_form(value, form)

"""What ``--json`` prints is what ``surgeon schema`` promises, for every command that has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from tensorsurgeon.cli import main
from tensorsurgeon.cli.schema import SCHEMAS
from tests.checkpoints import FIXTURE

TEXT = FIXTURE.parent / "text" / "heldout.txt"


def said(*arguments: object, statuses: tuple[int, ...] = (0,)) -> Any:
    run = CliRunner().invoke(main, [str(a) for a in arguments])
    assert run.exit_code in statuses, run.output
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schema") / "out"
    Draft202012Validator(SCHEMAS["apply"]).validate(said("apply", "quark-w8a8-int8", FIXTURE, folder, "--json", "-q"))
    return folder


COMMANDS: list[tuple[str, list[object]]] = [
    ("inspect", ["TARGET"]),
    ("plan", ["ct-w4a16-g32", FIXTURE]),
    ("plan", ["ct-w4a16-g32", FIXTURE, "--calibration", TEXT, "--samples", "2", "--sequence-length", "16"]),
    ("resume", ["TARGET"]),
    ("verify", ["TARGET", "--against", FIXTURE]),
    ("verify", ["TARGET"]),
    ("diff", [FIXTURE, "TARGET", "--headers-only"]),
    ("evaluate", ["TARGET", "--against", FIXTURE, "--text", TEXT, "--samples", "2", "--sequence-length", "16", "--no-file"]),
    ("evaluate", ["TARGET", "--text", TEXT, "--samples", "1", "--sequence-length", "16", "--no-file"]),
    ("card", ["TARGET"]),
    ("transforms", []),
    ("transforms", ["quantize-linears"]),
]


@pytest.mark.parametrize(("command", "arguments"), COMMANDS, ids=lambda value: value if isinstance(value, str) else None)
def test_output_keeps_what_is_promised(command: str, arguments: list[object], target: Path) -> None:
    given = [target if a == "TARGET" else a for a in arguments]
    Draft202012Validator(SCHEMAS[command]).validate(said(command, *given, "--json", statuses=(0, 1)))


def test_every_command_with_json_has_a_schema_that_is_one() -> None:
    with_json = {name for name, command in main.commands.items() if any(p.name == "as_json" for p in command.params)}
    assert with_json == SCHEMAS.keys()
    printed = said("schema")
    assert printed["$defs"].keys() == SCHEMAS.keys()
    Draft202012Validator.check_schema(printed)
    for schema in printed["$defs"].values():
        Draft202012Validator.check_schema(schema)


def test_a_promise_that_is_broken_is_noticed(target: Path) -> None:
    data = said("plan", "ct-w4a16-g32", FIXTURE, "--json")
    del data["engines"][0]["loads_at_tp"]
    assert not Draft202012Validator(SCHEMAS["plan"]).is_valid(data)

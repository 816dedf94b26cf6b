"""`surgeon resume TARGET`, and `apply --resume TARGET`: the command that was stopped goes on without being typed again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tensorsurgeon.calibrate.state import CalibrationState
from tensorsurgeon.cli import main
from tensorsurgeon.errors import Interrupted
from tensorsurgeon.running import run
from tests.calibrate.models import TEXT
from tests.checkpoints import FIXTURE, folder_bytes, moe_config, tiny_moe, write_checkpoint

OPTIONS = ("--set", "also_exclude=lm_head.weight", "--then", "shards.yaml", "--max-shard-size", "3KB", "--workers", "1", "-q")
RECIPE = "description: names\nsteps:\n  - rename: {where: model.temperature, to: model.heat}\n"
CALIBRATED = ("--set", "group_size=32", "--calibration", str(TEXT), "--samples", "2", "--sequence-length", "32", "--no-polish")


def surgeon(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def stopped(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """A run that ends before it publishes anything."""

    def stop(*_: Any) -> None:
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(run, "_publish", stop)
        result = surgeon(*arguments)
    assert result.exit_code == 130, (result.output, result.exception)
    assert "continue with: surgeon resume" in result.stderr


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to type in, with a source and a transform that are named as they lie there."""
    folder = tmp_path / "work"
    write_checkpoint(folder / "source", tiny_moe(), shards=3, config=moe_config())
    (folder / "shards.yaml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("words", [("resume",), ("apply", "--resume"), ("resume", "--workers", "2", "--max-ram", "1GB")], ids=str)
def test_a_stopped_run_goes_on_from_anywhere_with_the_words_it_was_begun_with(
    words: tuple[str, ...], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert surgeon("apply", "quark-w8a8-int8", "source", "whole", *OPTIONS).exit_code == 0
    stopped(monkeypatch, "apply", "quark-w8a8-int8", "source", "out", *OPTIONS)
    # The target may have been moved, and the person may be elsewhere.
    (work / "out").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    result = surgeon(*words, "moved", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    done = json.loads(result.stdout)
    assert done["resumed_units"] == done["units"] > 1
    assert folder_bytes(tmp_path / "moved") == folder_bytes(work / "whole")
    assert "going on with: surgeon apply quark-w8a8-int8 source moved --set=" in result.stderr


def test_a_calibrated_run_goes_on_at_its_layer_with_its_data_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("apply", "ct-w4a16-g32", FIXTURE, tmp_path / "out", *CALIBRATED)
    assert surgeon("apply", "ct-w4a16-g32", FIXTURE, tmp_path / "whole", *CALIBRATED).exit_code == 0
    advance = CalibrationState.advance

    def stop_after_two(self: CalibrationState, *arguments: Any) -> Any:
        found = advance(self, *arguments)
        if found.layer == 2:
            raise Interrupted("stopped")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationState, "advance", stop_after_two)
        assert surgeon(*command).exit_code == 130
    result = surgeon("resume", tmp_path / "out")
    assert result.exit_code == 0, (result.output, result.exception)
    outputs = [folder_bytes(tmp_path / name) for name in ("whole", "out")]
    for files in outputs:
        # Seconds that layers took.
        files.pop("quant_log.csv")
    assert outputs[0] == outputs[1]


def test_other_words_are_another_run(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(monkeypatch, "apply", "quark-w8a8-int8", "source", "out", *OPTIONS)
    before = folder_bytes(work / "out")
    result = surgeon("apply", "--resume", "out", "--max-shard-size", "4KB")
    assert result.exit_code == 50, result.output
    assert folder_bytes(work / "out") == before


def test_of_a_finished_run_it_looks_whether_what_stands_there_is_whole(work: Path) -> None:
    assert surgeon("apply", "quark-w8a8-int8", "source", "out", "-q").exit_code == 0
    result = surgeon("resume", "out")
    assert (result.exit_code, result.stdout) == (0, "out: was complete already\n")
    assert json.loads(surgeon("resume", "out", "--json").stdout) == {"target": "out", "was_complete": True}
    (work / "out" / "config.json").write_text("{}")
    result = surgeon("apply", "--resume", "out")
    assert result.exit_code == 35
    assert "config.json was changed or removed" in result.stderr


@pytest.mark.parametrize("place", ["nowhere", "source", "source/config.json", "empty"])
def test_where_nothing_was_stopped_there_is_nothing_to_go_on_with(place: str, work: Path) -> None:
    (work / "empty").mkdir()
    result = surgeon("resume", place)
    assert result.exit_code == 35
    assert "there is no stopped run to resume" in result.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"command": []},
        {"command": "rm"},
        {"command": ["a", 5]},
        {"command": None},
        {"folder": "/nowhere\x00"},
        {"folder": "/nowhere"},
    ],
    ids=str,
)
def test_a_record_without_words_is_told(change: dict[str, Any], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(monkeypatch, "apply", "quark-w8a8-int8", "source", "out", "-q")
    path = work / "out" / ".surgeon" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    result = surgeon("resume", "out")
    assert result.exit_code == 50, (result.output, result.exception)
    assert "Traceback" not in result.output


@pytest.mark.parametrize("words", [["--overwrite"], ["--nonsense"], ["extra"], ["--set"], ["--help"], ["--workers=x"]], ids=str)
def test_words_that_no_run_wrote_are_no_way_to_overwrite(words: list[str], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(monkeypatch, "apply", "quark-w8a8-int8", "source", "out", "-q")
    path = work / "out" / ".surgeon" / "run.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"command": [*known["command"], *words]}))
    before = folder_bytes(work / "out")
    result = surgeon("resume", "out")
    assert (result.exit_code == 0) == (words == ["--help"])
    assert "Traceback" not in result.output
    assert folder_bytes(work / "out") == before


@pytest.mark.parametrize("words", [("a",), ("a", "b"), ("a", "b", "--resume"), ()])
def test_without_a_source_or_target_a_run_cannot_begin(words: tuple[str, ...], work: Path) -> None:
    result = surgeon("apply", *words)
    assert result.exit_code == 2
    assert "Missing argument" in result.stderr


def test_a_target_whose_name_looks_like_an_option_is_resumed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("source", "-source")
    stopped(monkeypatch, "apply", "-q", "--", "quark-w8a8-int8", "-source", "--out")
    assert surgeon("resume", "--", "--out").exit_code == 0
    assert (work / "--out" / "surgeon.json").exists()

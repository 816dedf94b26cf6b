"""What a stopped calibrated run left is believed piece by piece, or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tensorsurgeon.calibrate.driver import Codes
from tensorsurgeon.calibrate.log import LOG_NAME, read_log
from tensorsurgeon.calibrate.run import run_calibrated
from tensorsurgeon.calibrate.state import CalibrationState, Reached
from tensorsurgeon.checkpoint.header import read_header
from tensorsurgeon.errors import JournalError, PlanViolationError
from tests.calibrate.models import comparable, options_of, plan_of
from tests.checkpoints import FIXTURE

LAYERS = 2


class Stopped(Exception):
    """The run dies here."""


def run(target: Path, *, kept: Path | None = None, resume: bool = False, **fields: Any) -> None:
    options = options_of(samples=4, sequence_length=64, write_statistics=kept, **fields)
    run_calibrated(plan_of(FIXTURE), target, options, workers=2, resume=resume)


def cut(target: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """A run that stops once two layers are finished."""
    advance = CalibrationState.advance

    def stopping(self: CalibrationState, reached: Reached, *rest: Any) -> Reached:
        made = advance(self, reached, *rest)
        if made.layer == LAYERS:
            raise Stopped
        return made

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationState, "advance", stopping)
        with pytest.raises(Stopped):
            run(target, **fields)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(folder)
    return comparable(folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        cut(folder, patch)
    return folder


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 16
    path.write_bytes(raw)


def code_of_a_finished_layer(target: Path) -> None:
    for path in sorted(target.glob("*.partial")):
        for entry in read_header(path).entries:
            if ".layers.0." in entry.spec.name and entry.spec.name.endswith("weight_packed"):
                flip(path, entry.offset + 3)
                return
    pytest.fail("no code of layer 0")


def lost_lines(target: Path) -> None:
    journal = target / ".surgeon" / "journal.jsonl"
    lines = journal.read_text().splitlines(True)
    journal.write_text(lines[0] + "".join("#" + line for line in lines[1:4]) + "".join(lines[4:]))


def states(target: Path) -> None:
    flip(target / ".surgeon" / f"hidden-{LAYERS:05d}.bin", 4097)


def shorter_states(target: Path) -> None:
    path = target / ".surgeon" / f"hidden-{LAYERS:05d}.bin"
    path.write_bytes(path.read_bytes()[:-2])


def no_states(target: Path) -> None:
    (target / ".surgeon" / f"hidden-{LAYERS:05d}.bin").unlink()


def another_log(target: Path) -> None:
    path = target / ".surgeon" / "log-00000.csv"
    path.write_text(path.read_text().replace("gptq", "rtn"))


def no_log(target: Path) -> None:
    (target / ".surgeon" / "log-00001.csv").unlink()


def a_later_layer(target: Path) -> None:
    path = target / ".surgeon" / "calibration.json"
    path.write_text(path.read_text().replace('"layer": 2', '"layer": 3'))


def another_run(target: Path) -> None:
    path = target / ".surgeon" / "calibration.json"
    known = json.loads(path.read_text())
    known["fingerprint"] = "0" * 64
    path.write_text(json.dumps(known))


def no_state(target: Path) -> None:
    (target / ".surgeon" / "calibration.json").unlink()


def half_a_state(target: Path) -> None:
    path = target / ".surgeon" / "calibration.json"
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        code_of_a_finished_layer, lost_lines, states, shorter_states, no_states, another_log, no_log, a_later_layer, another_run,
        no_state, half_a_state,
    ],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_damage_before_a_resume_changes_no_byte(
    damage: Callable[[Path], None], stopped: Path, whole: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "out"
    shutil.copytree(stopped, target)
    damage(target)
    with caplog.at_level(logging.INFO, logger="tensorsurgeon.calibrate"):
        run(target, resume=True)
    assert comparable(target) == whole
    said = [record.getMessage() for record in caplog.records]
    assert any(text.startswith("layer 0 of 0 to 3") for text in said)
    assert any("starts again at the first layer" in text for text in said) or damage is no_state


def test_without_damage_it_goes_on_at_its_layer(
    stopped: Path, whole: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(stopped, tmp_path / "out")
    with caplog.at_level(logging.INFO, logger="tensorsurgeon.calibrate"):
        run(tmp_path / "out", resume=True)
    assert comparable(tmp_path / "out") == whole
    layers = [record.getMessage().partition(":")[0] for record in caplog.records if record.getMessage().startswith("layer ")]
    assert layers == ["layer 2 of 0 to 3", "layer 3 of 0 to 3"]


def test_damaged_statistics_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    cut(tmp_path / "out", monkeypatch, kept=kept)
    path = kept / "layer-00000.safetensors"
    sound = load(path.read_bytes())
    flip(path, path.stat().st_size - 9)
    run(tmp_path / "out", kept=kept, resume=True)
    made = load(path.read_bytes())
    assert made.keys() == sound.keys()
    assert all(torch.equal(made[key], sound[key]) for key in sound)


@pytest.mark.parametrize("fields", [{"seed": 1}, {"minimum_tokens": 3}, {"fallback_tokens": 1}])
def test_other_data_and_options_are_another_run(fields: dict[str, Any], stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "out")
    with pytest.raises(JournalError, match="the run that was stopped here had another"):
        run(tmp_path / "out", resume=True, **fields)


def test_a_module_that_nothing_was_decided_about_is_an_error_and_not_rounded() -> None:
    codes = Codes({"a": None})
    assert codes.quantized("a", 0, 4) is None
    with pytest.raises(PlanViolationError, match="b: is written before its layer was calibrated"):
        codes.quantized("b", 0, 4)


def test_the_log_of_a_calibrated_source_does_not_take_this_runs_place(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(FIXTURE, source)
    (source / LOG_NAME).write_text("layer,module\n7,another run's\n")
    run_calibrated(plan_of(source), tmp_path / "out", options_of(samples=2, sequence_length=32), workers=1)
    assert len(read_log(tmp_path / "out" / LOG_NAME)) == 127

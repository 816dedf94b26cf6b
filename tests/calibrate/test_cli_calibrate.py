"""Calibration from the command line: options become what the library takes, and are refused where nothing wants them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tensorsurgeon.calibrate.log import LOG_NAME, read_log
from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource
from tensorsurgeon.cli.calibrate import calibration_options, options_from, run_with_calibration
from tensorsurgeon.errors import RecipeError
from tests.calibrate.models import TEXT, plan_of
from tests.checkpoints import FIXTURE


@click.command()
@click.option("--other")
@calibration_options
def command(calibration: dict[str, Any], other: str | None) -> None:
    click.echo(repr((sorted(calibration.items()), other)))


def given(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(command, [*arguments, "--other", "x"])
    assert result.exit_code == 0, result.output
    found, other = eval(result.output)
    assert other == "x"
    return dict(found)


def test_nothing_given_is_nothing() -> None:
    assert given() == {}


def test_options_become_calibration_options() -> None:
    found = options_from(
        given(
            *("--calibration", "chat.jsonl:0.75", "--calibration", "prose.txt:0.25", "--samples", "64", "--seed", "3"),
            *("--experts", "routed", "--no-sequential", "--no-polish", "--damp-percent", "0.05", "--write-statistics", "s"),
        )
    )
    assert found.sources == (DataSource("chat.jsonl", 0.75), DataSource("prose.txt", 0.25))
    assert (found.samples, found.seed, found.experts, found.sequential) == (64, 3, "routed", False)
    assert (found.gptq.polish, found.gptq.damp_percent, found.write_statistics) == (None, 0.05, Path("s"))


def test_a_zero_that_was_given_is_a_number() -> None:
    zeros = ("--seed", "0", "--minimum-tokens", "0", "--fallback-tokens", "0", "--damp-percent", "0")
    found = options_from(given("--calibration", "a.txt", *zeros))
    assert (found.seed, found.minimum_tokens, found.fallback_tokens, found.gptq.damp_percent) == (0, 0, 0, 0.0)


def test_the_help_states_the_defaults() -> None:
    text = " ".join(CliRunner().invoke(command, ["--help"], terminal_width=200).output.split())
    defaults = CalibrationOptions(sources=(DataSource("x"),))
    for name in ("samples", "sequence_length", "seed", "experts", "expert_hessian", "minimum_tokens", "fallback_tokens"):
        start = text.index(f"--{name.replace('_', '-')} ")
        assert f"[default: {getattr(defaults, name)}]" in text[start : start + 250], name
    assert f"[default: {defaults.gptq.damp_percent}]" in text


def test_a_calibrated_transform_without_data_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"by calibration: give --calibration FILE .*, or --read-statistics FOLDER"):
        run_with_calibration(plan_of(FIXTURE), str(tmp_path / "out"), {})


def test_data_that_no_step_wants_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="leave --calibration, --samples away"):
        run_with_calibration(plan_of(FIXTURE, method="rtn"), str(tmp_path / "out"), {"sources": ("a",), "samples": 3})


def test_layers_and_the_summary_are_told(tmp_path: Path) -> None:
    lines: list[str] = []
    asked = {"sources": (str(TEXT),), "samples": 4, "sequence_length": 64, "no_polish": True}
    result, summary = run_with_calibration(plan_of(FIXTURE), str(tmp_path / "out"), asked, note=lines.append, workers=2)
    assert summary is not None
    assert summary["methods"] == {"gptq": len(read_log(tmp_path / "out" / LOG_NAME))}
    assert sum(line.startswith("layer ") for line in lines) == 4
    assert any("modules: 127 gptq (100.0 %)" in line for line in lines)
    assert result.units > 100


def test_the_command_line_imports_no_torch() -> None:
    code = "import sys, tensorsurgeon.cli.calibrate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FIXTURE.parents[1])

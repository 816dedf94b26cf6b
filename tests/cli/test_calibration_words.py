"""``--calibration`` at the terminal: which steps it reaches, the text that comes along, the dry run, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tensorsurgeon.cli import main
from tests.checkpoints import FIXTURE

SHORT = ("--samples", "2", "--sequence-length", "32", "--no-polish", "-q")
MINE = """
description: one's own, without a parameter called method
steps:
  - split_experts: {exclude: ["maybe:role:mtp"]}
  - quantize: {where: ["role:expert"], exclude: ["maybe:role:mtp"], format: ct-packed, num_bits: 4, group_size: 32}
  - quantize: {where: ["{p*}.self_attn.{leaf}_proj.weight"], exclude: ["maybe:role:mtp"], format: ct-float}
"""


def surgeon(*arguments: object, status: int = 0) -> Any:
    run = CliRunner().invoke(main, [str(a) for a in arguments])
    assert run.exit_code == status, run.output
    return run


def test_it_reaches_every_step_of_one_s_own_yaml_that_can_use_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    run = surgeon("apply", tmp_path / "mine.yaml", FIXTURE, tmp_path / "out", "--calibration", "builtin", *SHORT, "--json")
    assert json.loads(run.stdout)["methods"] == {"gptq": 100}
    assert (tmp_path / "out" / "quant_log.csv").exists()


def test_steps_that_can_use_nothing_are_named(tmp_path: Path) -> None:
    run = surgeon("plan", "split-experts", FIXTURE, "--calibration", "builtin", status=10)
    assert "no step can be calibrated (split_experts: no quantize among them)" in run.output


def test_a_method_that_is_named_is_kept(tmp_path: Path) -> None:
    options = ("--calibration", "builtin", "--set", "method=imatrix", *SHORT)
    data = json.loads(surgeon("apply", "gptq-int4-g128", FIXTURE, tmp_path / "out", *options, "--json").stdout)
    assert data["methods"] == {"imatrix": 96}


def test_rounding_is_said_where_the_layout_is_called_as_an_algorithm(tmp_path: Path) -> None:
    words = "rounded to nearest (RTN); GPTQ is the layout's name, not what chose the codes"
    assert words in surgeon("plan", "gptq-int4-g128", FIXTURE).stdout
    run = surgeon("apply", "gptq-int4-g128", FIXTURE, tmp_path / "out")
    assert words in run.stdout
    lines = run.stdout.splitlines()
    assert lines[2].startswith("  engines  transformers 5.23: LOADS IT AND ANSWERS NONSENSE")
    assert lines[-1] == f"  next     surgeon verify {tmp_path / 'out'} --against {FIXTURE}"
    assert words not in surgeon("plan", "quark-w8a8-int8", FIXTURE).stdout


def test_a_plan_with_data_is_a_dry_run(tmp_path: Path) -> None:
    command = ("plan", "gptq-int4-g128", FIXTURE, "--calibration", "builtin", "--samples", "3", "--sequence-length", "64")
    found = json.loads(surgeon(*command, "--json").stdout)["calibration"]
    assert (found["tokens"], found["layers"], found["model"]) == (192, 4, "Qwen3_5MoeForConditionalGeneration")
    assert found["linears"] == {"calibrated": 96, "rounded": {}}
    assert found["seconds"]["per_layer"].keys() == {"walk", "sums", "codes"}
    assert all(value >= 0 for value in found["seconds"]["per_layer"].values())
    text = surgeon(*command).stdout
    assert "data     3 sequences of 64, 192 tokens: builtin x 3" in text
    assert "codes   96 linears chosen by GPTQ" in text
    assert "calibration" not in json.loads(surgeon("plan", "gptq-int4-g128", FIXTURE, "--json").stdout)


def test_the_text_that_comes_along_warns_that_one_s_own_is_better(caplog: pytest.LogCaptureFixture) -> None:
    run = surgeon("plan", "gptq-int4-g128", FIXTURE, "--calibration", "builtin", "--samples", "2", "--sequence-length", "32")
    assert "text like the model's own use serves it better" in run.stderr + caplog.text


def test_home_is_found_where_no_shell_has_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    surgeon("apply", "split-experts", FIXTURE, "~/out", "-q")
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "~").exists()
    surgeon("inspect", "~/out")


def test_help_is_whole_and_in_sections() -> None:
    lines = surgeon("--help").stdout.splitlines()
    assert not [line for line in lines if line.endswith("...") and not line.startswith("Usage")]
    text = surgeon("apply", "--help").stdout
    places = [text.index(f"\n{title}:\n") for title in ("What to make", "Calibration", "Running", "Output")]
    assert places == sorted(places)
    assert text.index("--experts ") < places[2] < text.index("\n  --workers")

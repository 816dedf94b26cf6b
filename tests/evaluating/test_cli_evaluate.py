"""The command: what it prints, and the file that it leaves for card and page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tensorsurgeon.cli import main
from tests.checkpoints import FIXTURE
from tests.evaluating.judging import HELDOUT, convert

TEXT = ["--text", str(HELDOUT), "--samples", "3", "--sequence-length", "64"]
KEYS = {"kl", "kl_se", "reverse_kl", "top1_agreement", "nll", "perplexity"}


def surgeon(*arguments: object, status: int = 0) -> Any:
    run = CliRunner().invoke(main, [str(a) for a in arguments])
    assert run.exit_code == status, run.output
    return run


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("made")
    return [
        convert("ct-w8a8-int8", FIXTURE, folder / "int8"),
        convert("quantize-linears", FIXTURE, folder / "int4", format="ct-packed", num_bits=4, group_size=32),
    ]


def test_json_has_the_figures_and_the_file_lies_beside_each_target(targets: list[Path]) -> None:
    before = [(t / "surgeon.json").read_bytes() for t in targets]
    run = surgeon("evaluate", *targets, "--against", FIXTURE, *TEXT, "--json")
    data = json.loads(run.stdout)
    assert [t["path"] for t in data["targets"]] == [str(t) for t in targets]
    assert all(t.keys() >= KEYS for t in data["targets"])
    assert data["source"].keys() >= {"nll", "perplexity"}
    assert data["text"]["tokens"] == 192
    for found, target, record in zip(data["targets"], targets, before, strict=True):
        kept = json.loads((target / "evaluation.json").read_text())
        assert kept["target"] == {key: value for key, value in found.items() if key != "path"}
        assert str(FIXTURE) not in json.dumps(kept)
        # The record knows the file now, and verify has nothing to say of it; else it is what it was.
        after = json.loads((target / "surgeon.json").read_text())
        known = json.loads(record)
        assert after["files"].pop("evaluation.json")[0] == (target / "evaluation.json").stat().st_size
        assert after == known
        assert json.loads(surgeon("verify", target, "--against", FIXTURE, "--json").stdout)["notes"] == []
    surgeon("apply", "-q", "ct-w8a8-int8", FIXTURE, targets[0], "--overwrite")
    assert not (targets[0] / "evaluation.json").exists()


def test_a_table_for_people(targets: list[Path]) -> None:
    run = surgeon("evaluate", *targets, "--against", FIXTURE, *TEXT, "--no-file")
    lines = run.stdout.splitlines()
    assert lines[0] == "192 tokens in 3 sequences of 64, on cpu"
    assert lines[2].split()[:1] == ["KL(source"]
    assert lines[4].startswith("int8 ")
    assert "int8 per token, dynamic" in lines[4]
    assert "3 sequences are few" in run.stdout
    assert not (targets[1] / "evaluation.json").exists() or "kl" in (targets[1] / "evaluation.json").read_text()
    assert "layer 3 of 0 to 3" in run.stderr


def test_without_a_source_there_is_perplexity_alone(targets: list[Path]) -> None:
    data = json.loads(surgeon("evaluate", targets[1], *TEXT, "--json", "--no-file", "-q").stdout)
    assert data["source"] is None
    assert not KEYS - {"nll", "perplexity"} & data["targets"][0].keys()
    assert data["targets"][0]["perplexity"] > 1


def test_a_text_is_needed(targets: list[Path]) -> None:
    assert "Missing option '--text'" in surgeon("evaluate", targets[0], status=2).output

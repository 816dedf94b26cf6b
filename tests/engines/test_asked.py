"""Asking the engine again gives what the package says of it."""

from __future__ import annotations

import json
import subprocess
from importlib import resources

import pytest

from tests.engines.judging import ROOT, Engine

FAMILIES = ("llama", "olmoe")


@pytest.mark.engine
def test_vllm_says_the_same_again(vllm: Engine) -> None:
    command = [vllm.python, "-m", "tests.families.ask_vllm", *FAMILIES]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    again = json.loads(run.stdout[run.stdout.index("{") :])
    kept = json.loads(resources.files("tensorsurgeon.models").joinpath("asked/vllm.json").read_text())
    assert again["engine"] == kept["engine"]
    assert [entry["families"] for entry in again["architectures"].values()] == [[name] for name in FAMILIES]
    for architecture, entry in again["architectures"].items():
        assert entry == kept["architectures"][architecture]

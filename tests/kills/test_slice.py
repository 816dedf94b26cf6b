"""A few kills and damages of the campaign (`make kills`), in a process of its own that has one thread when it forks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_slice_of_the_campaign_loses_no_byte() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--only", "rtn", "--kills", "4", "--seed", "7", "--kinds", "5"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 wrong" in done.stdout

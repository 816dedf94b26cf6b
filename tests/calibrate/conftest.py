"""Checkpoints that several calibration tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.calibrate.models import split_fixture


@pytest.fixture(scope="session")
def split_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained fixture, its experts one by one."""
    return split_fixture(tmp_path_factory.mktemp("calibrate") / "split")

"""What every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.checkpoints import moe_config, tiny_moe, write_checkpoint

# No test may reach for the network, and property tests take the same examples everywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("fixed")


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    """A small mixture-of-experts checkpoint in three shards with an index and a config."""
    return write_checkpoint(tmp_path / "moe", tiny_moe(), shards=3, config=moe_config())

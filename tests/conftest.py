"""What every test shares."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.checkpoints import moe_config, tiny_moe, write_checkpoint

# No test may reach for the network, and property tests take the same examples everywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Code that tests compile is kept here, not in the user's own cache.
os.environ.setdefault("TENSORSURGEON_CACHE", str(Path(__file__).parents[1] / ".kernels"))
settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("fixed")


class _Fallbacks(logging.Handler):
    """Kernels that fell back to numba, which is right but slow and would go unnoticed; see ``kernels.compiled``."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


FALLBACKS = _Fallbacks()
# For the whole session: fixtures of modules and of the session compile too.
logging.getLogger("tensorsurgeon.quant.loops").addHandler(FALLBACKS)


@pytest.fixture(autouse=True)
def kernels_stand_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """No kernel has fallen back to numba since the last test."""
    yield
    said, FALLBACKS.said = FALLBACKS.said, []
    assert not said or request.node.get_closest_marker("kernels_may_warn"), said


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    """A small mixture-of-experts checkpoint in three shards with an index and a config."""
    return write_checkpoint(tmp_path / "moe", tiny_moe(), shards=3, config=moe_config())

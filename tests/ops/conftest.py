"""Cases become parameters, and folders lie in memory: hundreds of small runs that wait for a disk would take minutes."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.ops import pytest_generate_tests

__all__ = ["pytest_generate_tests", "tmp_path"]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)

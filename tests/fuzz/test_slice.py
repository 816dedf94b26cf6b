"""A slice of ``make fuzz``: some hundred damaged checkpoints through the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.__main__ import try_seed
from tests.fuzz.mutations import bases


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return bases(tmp_path_factory.mktemp("bases"))


# Time and memory are those of a process alone on a machine: ``make fuzz`` looks at them.
NOT_HERE = ("slow", "memory")


@pytest.mark.parametrize("applies", [False, True])
def test_damaged_checkpoints_are_refused_or_read(applies: bool, sound: list[Path], tmp_path: Path) -> None:
    wrong = []
    for seed in range(60 if applies else 120):
        what, faults = try_seed(seed, sound, tmp_path, applies)
        wrong += [f"seed {seed}: {what}: {fault}" for fault in faults if fault.partition(": ")[2].split()[0] not in NOT_HERE]
    assert not wrong, "\n".join(map(ascii, wrong))

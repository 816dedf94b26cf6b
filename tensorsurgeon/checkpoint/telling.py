"""Files that this program puts beside a checkpoint to tell of it: how it was made, how good it is, what it looks like.

They tell of one checkpoint. What is made of it by another conversion would be described by them wrongly, under numbers that were
measured on something else, so that they stay behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tensorsurgeon.checkpoint.small_files import MAX_CONFIG_BYTES

MADE: Final = "surgeon_plan.json"
LOG: Final = "quant_log.csv"
EVALUATION: Final = "evaluation.json"
VERIFICATION: Final = "verification.json"
PAGE: Final = "surgeon.html"
CARD: Final = "README.md"
BEGIN: Final = "<!-- surgeon: what follows is generated, `surgeon card` writes it anew; write above or below -->"
"""What stands before the generated part of a card; one without it is a person's, and travels."""

_ALWAYS: Final = frozenset((MADE, LOG, EVALUATION, VERIFICATION, PAGE))


def tells_of_source(root: Path, name: str) -> bool:
    """Whether a side file of the checkpoint ``root``, by its path in it, tells of that checkpoint alone."""
    if name != CARD:
        return name in _ALWAYS
    path = root / name
    return path.stat().st_size <= MAX_CONFIG_BYTES and BEGIN.encode() in path.read_bytes()

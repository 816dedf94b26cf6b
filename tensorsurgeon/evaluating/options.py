"""What an evaluation is asked for; plain values, so that whoever only states them imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SAMPLES: Final = 64
SEQUENCE_LENGTH: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """Which text: ``samples`` sequences of ``sequence_length`` tokens drawn by ``seed``; of lists of ids the first, cut there."""

    locations: tuple[str, ...]
    samples: int = SAMPLES
    sequence_length: int = SEQUENCE_LENGTH
    seed: int = 0

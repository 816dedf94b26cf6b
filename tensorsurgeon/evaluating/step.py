"""Where an evaluation is, for whoever waits for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """``done`` of ``total``: layers of all models, or rows of the vocabulary; ``what`` says of which."""

    done: int
    total: int
    what: str

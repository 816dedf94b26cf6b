"""Faults planted one at a time in good checkpoints: a case, a way to register one, and the test they all share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from tensorsurgeon.verifying import verify
from tests.verifying.subjects import Spoilt, source_of, subject

L: Final = "model.layers.0"
E1: Final = f"{L}.mlp.experts.1.up_proj"
Q: Final = f"{L}.self_attn.q_proj"
HL: Final = "model.language_model.layers"
CONFIG: Final = "config.json quantization_config"


class Case(NamedTuple):
    """One fault: ``where`` the finding must point, exactly, and ``words`` that its message must have."""

    name: str
    subject: str
    spoil: Callable[[Spoilt], object]
    kind: str
    where: str
    words: tuple[str, ...]
    against: bool
    copies: bool


class Cases(list[Case]):
    """The planted faults of one file."""

    def planted(
        self, name: str, kind: str, where: str, *words: str, against: bool = False, copies: bool = True
    ) -> Callable[[Callable[[Spoilt], object]], Callable[[Spoilt], object]]:
        """Register a fault for a subject; ``against`` verifies with its source, ``copies`` keeps the config's copies equal."""

        def register(spoil: Callable[[Spoilt], object]) -> Callable[[Spoilt], object]:
            self.append(Case(f"{name}: {spoil.__name__}", name, spoil, kind, where, words, against, copies))
            return spoil

        return register


def check_found(case: Case, folder: Path) -> None:
    """The fault is found where it was planted, and the message says what it is."""
    spoilt = Spoilt(subject(case.subject), folder)
    case.spoil(spoilt)
    found = verify(spoilt.save(copies=case.copies), source_of(case.subject) if case.against else None, workers=1)
    hits = [f for f in found.faults if (f.kind, f.where) == (case.kind, case.where)]
    assert hits, [str(f) for f in found.faults]
    message = " | ".join(f.message for f in hits)
    assert not [word for word in case.words if word not in message], message

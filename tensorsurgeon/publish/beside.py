"""What a conversion puts beside the weights for those who get them: how it was made, and a first card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tensorsurgeon.engines.advice import EngineAdvice
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.publish.card import BASE_CARD, first_card
from tensorsurgeon.publish.made import FILE_NAME, made_bytes, made_of
from tensorsurgeon.running.run import NOTHING_BESIDE, Beside


def card_beside(
    plan: Plan, target: Path, command: Sequence[str], advice: Sequence[EngineAdvice], tell: Callable[[str], None]
) -> Beside:
    """Both, where linears were quantized: after other surgery the original's card still holds.

    A card that cannot be made is told and stops nothing, for the weights are whole.
    """
    if not plan.written:
        return NOTHING_BESIDE

    def write() -> None:
        try:
            first_card(target, {FILE_NAME: made_bytes(made_of(plan, command, advice))})
        except (SurgeonError, OSError) as error:
            tell(f"note: no card was written: {error}")

    # The card itself is in the record before it is written; by its name alone it could be a person's.
    return Beside((FILE_NAME, BASE_CARD), write)

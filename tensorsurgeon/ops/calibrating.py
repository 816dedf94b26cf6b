"""Data to calibrate on, given to steps: those that choose codes choose them with it, whoever wrote the recipe."""

from __future__ import annotations

from collections.abc import Sequence

from tensorsurgeon.errors import RecipeError
from tensorsurgeon.planning.rewriting import AnyTransform, Transform, op_name, steps_of


def with_calibration(transform: AnyTransform) -> tuple[tuple[Transform, ...], list[str]]:
    """The steps as they are with data, and the steps that cannot use it, in words.

    What a step becomes, its class says in ``calibrated``; classes without that choose no codes. A step that names another method
    keeps it. RecipeError where no step can use the data.
    """
    steps: list[Transform] = []
    cannot: list[str] = []
    is_used = False
    for step in steps_of(transform):
        calibrate = getattr(type(step), "calibrated", None)
        found = step if calibrate is None else calibrate(step)
        if isinstance(found, str):
            cannot.append(found)
            found = step
        elif calibrate is not None:
            is_used = True
        steps.append(found)
    if not is_used:
        raise RecipeError(f"no step can be calibrated ({_why(steps, cannot)})", remedy="; leave {calibration} away")
    return tuple(steps), cannot


def _why(steps: Sequence[Transform], cannot: Sequence[str]) -> str:
    if cannot:
        return "; ".join(dict.fromkeys(cannot))
    return f"{', '.join(dict.fromkeys(map(op_name, steps)))}: no quantize among them"

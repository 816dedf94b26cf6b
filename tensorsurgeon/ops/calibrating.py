"""Data to calibrate on, given to steps: those that choose codes choose them with it, whoever wrote the recipe."""

from __future__ import annotations

from tensorsurgeon.errors import RecipeError
from tensorsurgeon.planning.rewriting import AnyTransform, Transform, op_name, steps_of


def with_calibration(transform: AnyTransform) -> tuple[Transform, ...]:
    """The steps as they are with data.

    What a step becomes, its class says in ``calibrated``; classes without that choose no codes. RecipeError where no step can use
    the data.
    """
    steps = steps_of(transform)
    if not any(hasattr(type(step), "calibrated") for step in steps):
        names = ", ".join(dict.fromkeys(map(op_name, steps)))
        raise RecipeError(f"no step can be calibrated ({names}: no quantize among them)", remedy="; leave {calibration} away")
    return tuple(_calibrated(step) for step in steps)


def _calibrated(step: Transform) -> Transform:
    made: Transform = getattr(type(step), "calibrated", lambda step: step)(step)
    return made

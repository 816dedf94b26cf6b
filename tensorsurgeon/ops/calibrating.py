"""Data to calibrate on, given to steps: those that choose integer codes choose them by GPTQ then, whoever wrote the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tensorsurgeon.errors import RecipeError
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.planning.rewriting import AnyTransform, Transform, op_name, steps_of


def with_calibration(transform: AnyTransform) -> tuple[tuple[Transform, ...], list[str]]:
    """The steps with method ``gptq`` in the place of ``rtn`` where codes are integers, and the steps that cannot, in words.

    A step that names another method keeps it. RecipeError where no step can use the data.
    """
    steps: list[Transform] = []
    cannot: list[str] = []
    for step in steps_of(transform):
        if not isinstance(step, Quantize) or step.method != "rtn":
            steps.append(step)
        elif step.scheme.type != "int":
            cannot.append(f"{step.format}: {step.scheme.type} codes are only rounded to nearest")
            steps.append(step)
        else:
            steps.append(replace(step, method="gptq"))
    if not any(isinstance(step, Quantize) and step.method != "rtn" for step in steps):
        raise RecipeError(f"no step can be calibrated ({_why(steps, cannot)}); leave --calibration away")
    return tuple(steps), cannot


def _why(steps: Sequence[Transform], cannot: Sequence[str]) -> str:
    if cannot:
        return "; ".join(dict.fromkeys(cannot))
    return f"{', '.join(dict.fromkeys(map(op_name, steps)))}: no quantize among them"

"""What was made against what was planned, while a run goes on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tensorsurgeon.errors import PlanViolationError
from tensorsurgeon.planning.rewriting import Rewrite


def check_produced(rewrite: Rewrite, arrays: Sequence[np.ndarray]) -> None:
    """Raise PlanViolationError unless the arrays have exactly the planned dtypes and shapes."""
    if len(arrays) != len(rewrite.outputs):
        raise PlanViolationError(
            f"{rewrite.inputs[0]}: the plan has {len(rewrite.outputs)} outputs, the step made {len(arrays)}; "
            "please report this as a bug"
        )
    for region, array in zip(rewrite.outputs, arrays, strict=True):
        if array.dtype != region.spec.dtype.numpy or array.shape != region.shape:
            raise PlanViolationError(
                f"{region}: planned {region.spec.dtype.name}{list(region.shape)}, made {array.dtype}{list(array.shape)}; "
                "please report this as a bug"
            )

"""Calibration: the layer walk, statistics of what linears see, and runs whose codes come from them.

The modules of this package import torch and transformers; this file does not, so that a plan can be asked what it needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.planning.rewriting import Transform


def needs_calibration(steps: Sequence[Transform]) -> bool:
    """Whether a step asks for statistics."""
    return any(isinstance(step, Quantize) and step.method != "rtn" for step in steps)

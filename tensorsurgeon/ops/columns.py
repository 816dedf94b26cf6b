"""Cut and join arrays along their last axis, the one cut that is not a run of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.tensors.arrays import empty


def split_columns(rewrite: Rewrite, inputs: Sequence[Array]) -> list[Array]:
    """The parts of one array along its last axis, each contiguous, with the sizes that were planned."""
    (whole,) = inputs
    parts = []
    start = 0
    for region in rewrite.outputs:
        part = empty(region.shape, whole.dtype)
        np.copyto(part, whole[..., start : start + region.shape[-1]])
        parts.append(part)
        start += region.shape[-1]
    return parts


def join_columns(rewrite: Rewrite, inputs: Sequence[Array]) -> list[Array]:
    """Arrays side by side along the last axis."""
    whole = empty(rewrite.outputs[0].shape, inputs[0].dtype)
    np.concatenate(inputs, axis=-1, out=whole)
    return [whole]

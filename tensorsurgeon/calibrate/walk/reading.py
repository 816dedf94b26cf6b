"""Rows of checkpoint tensors, read from the shards."""

from __future__ import annotations

import numpy as np

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.errors import CheckpointError


class TensorReader:
    """Reads whole tensors or runs of their rows by name; safe to use from many threads."""

    def __init__(self, checkpoint: Checkpoint, source: Source) -> None:
        self.checkpoint = checkpoint
        self._source = source
        self._locations = dict(zip(checkpoint.specs, checkpoint.locations, strict=True))

    def whole(self, name: str) -> np.ndarray:
        """The tensor in its own dtype; CheckpointError for one that is no plain float."""
        spec = self.checkpoint.specs[name]
        if spec.dtype.numpy is None or not spec.dtype.is_float or spec.dtype.bits < 16:
            raise CheckpointError(
                f"{spec}: the walk needs weights in BF16, F16 or F32; dequantize the checkpoint first",
                where=str(self.checkpoint.root),
            )
        array = np.empty(spec.shape, spec.dtype.numpy)
        if array.size:
            self.rows_into(name, 0, spec.rows, array.reshape(-1).view(np.uint8).data)
        return array

    def rows_into(self, name: str, start: int, stop: int, view: memoryview) -> int:
        """Fill the front of ``view`` with rows of a tensor seen as ``[-1, last axis]``; returns their bytes."""
        spec = self.checkpoint.specs[name]
        where = self._locations[name]
        nbytes = (stop - start) * spec.row_bytes
        self._source.read_into(where.shard, where.offset + start * spec.row_bytes, view[:nbytes])
        return nbytes

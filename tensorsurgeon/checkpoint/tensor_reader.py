"""Bytes of a checkpoint in bounded pieces: whole small tensors, rows of large ones, ranges of any."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from types import TracebackType
from typing import Self

import numpy as np

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.places import Location
from tensorsurgeon.checkpoint.source import Source, open_source
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.tensors.spec import TensorSpec

CHUNK_BYTES = 1 << 20


class TensorReader:
    """Tensors of one checkpoint by name; safe to use from many threads.

    ``source`` are its shards where somebody else has them open and closes them; ``progress`` is told how many bytes
    were read.
    """

    def __init__(
        self, checkpoint: Checkpoint, source: Source | None = None, progress: Callable[[int], None] = lambda _: None
    ) -> None:
        self.checkpoint = checkpoint
        self.specs = checkpoint.specs
        self._progress = progress
        self._numbers = {name: number for number, name in enumerate(checkpoint.specs)}
        self._source = source or open_source(checkpoint)
        self._is_own = source is None

    def location(self, name: str) -> Location:
        """Which shard a tensor lies in, and where."""
        return self.checkpoint.locations[self._numbers[name]]

    def bytes_of(self, name: str, start: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes] from byte ``start`` of a tensor."""
        shard, offset = self.location(name)
        return self.shard_bytes(shard, offset + start, nbytes)

    def shard_bytes(self, shard: int, offset: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes] of a file; SourceError if it ends before."""
        data = np.empty(nbytes, np.uint8)
        if nbytes:
            self._source.read_into(shard, offset, data.data)
        self._progress(nbytes)
        return data

    def array(self, name: str) -> np.ndarray:
        """A whole tensor, in its own dtype and shape."""
        spec = self.specs[name]
        return elements(self.bytes_of(name, 0, spec.nbytes), spec).reshape(spec.shape)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor seen as [-1, last axis]: [stop - start, last axis]."""
        spec = self.specs[name]
        row = spec.row_bytes
        data = self.bytes_of(name, start * row, (stop - start) * row)
        return elements(data, spec).reshape(stop - start, prod(spec.shape[-1:]) if len(spec.shape) > 1 else 1)

    def rows_into(self, name: str, start: int, stop: int, view: memoryview) -> int:
        """Fill the front of ``view`` with rows of a tensor seen as [-1, last axis]; returns their bytes."""
        spec = self.specs[name]
        shard, offset = self.location(name)
        nbytes = (stop - start) * spec.row_bytes
        self._source.read_into(shard, offset + start * spec.row_bytes, view[:nbytes])
        self._progress(nbytes)
        return nbytes

    def close(self) -> None:
        """Let go of the files that it opened itself."""
        if self._is_own:
            self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def elements(data: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """uint8 bytes as elements of a tensor's own type; CheckpointError if they are narrower than a byte."""
    if spec.dtype.numpy is None:
        raise CheckpointError(f"{spec}: elements narrower than a byte have no array form")
    return data.view(spec.dtype.numpy)

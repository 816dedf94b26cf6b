"""The float weights of a checkpoint, whatever it is stored in: a quantized module is unpacked when it is asked for.

The walk sees the names and shapes that ``dequantize`` would write, and no such checkpoint is ever on disk: one module's
codes are read and become F32 by the same step that a conversion runs first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.quantization import quantization_config
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.planning.resolving import resolve
from tensorsurgeon.running.inputs import made_region
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec


class WeightReader(Protocol):
    """Reads whole tensors by name."""

    checkpoint: Checkpoint
    specs: SpecMap

    def array(self, name: str) -> np.ndarray:
        """A whole tensor, in its own dtype and shape."""
        ...


class FloatWeights:
    """Names and specs of the weights; ``unpacked`` are those that are made of codes, in F32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._names = list(checkpoint.specs)
        self._steps = (Dequantize(dtype="F32"),) if quantization_config(checkpoint.config) is not None else ()
        self._resolved = resolve(self._steps, checkpoint.specs)
        self.specs: SpecMap = self._resolved.specs
        contents = self._resolved.contents
        self.unpacked = frozenset(name for name, pieces in contents.items() if any(piece.origin < 0 for piece in pieces))

    def reader(self, source: Source) -> TensorReader | UnpackingReader:
        """Reads them from the shards that ``source`` has open."""
        reader = TensorReader(self.checkpoint, source)
        return UnpackingReader(self, reader, lambda spec: self._made(spec, source)) if self.unpacked else reader

    def stored(self, name: str) -> set[str]:
        """The checkpoint's tensors that a weight is read from."""
        waiting, found = [*self._resolved.contents[name]], set()
        while waiting:
            piece = waiting.pop()
            if piece.origin >= 0:
                found.add(self._names[piece.origin])
            else:
                task = self._resolved.tasks[self._resolved.made[-1 - piece.origin][0]]
                waiting += [piece for pieces in task.inputs for piece in pieces]
        return found

    def _made(self, spec: TensorSpec, source: Source) -> np.ndarray:
        return made_region(Region(spec), self._resolved.contents[spec.name], self._resolved, self._steps, source)


class UnpackingReader:
    """As ``TensorReader``, of a quantized checkpoint; safe to use from many threads."""

    def __init__(self, weights: FloatWeights, reader: TensorReader, make: Callable[[TensorSpec], np.ndarray]) -> None:
        self.checkpoint = weights.checkpoint
        self.specs = weights.specs
        self.unpacked = weights.unpacked
        self._reader = reader
        self._make = make

    def array(self, name: str) -> np.ndarray:
        """A whole tensor: F32 where it is made of codes, else as it is stored."""
        if name not in self.unpacked:
            return self._reader.array(name)
        array = self._make(self.specs[name])
        # Nobody else holds it.
        array.flags.writeable = True
        return array

    def rows_into(self, name: str, start: int, stop: int, view: memoryview) -> int:
        """Fill the front of ``view`` with rows of a tensor that is no codes; returns their bytes."""
        return self._reader.rows_into(name, start, stop, view)

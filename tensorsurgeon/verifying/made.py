"""A tensor that is computed from the source: what a recipe makes, or one expert of a stack."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from tensorsurgeon.checkpoint.tensor_reader import elements
from tensorsurgeon.tensors.spec import TensorSpec


class MadeTensor(ABC):
    """Its bytes, and its rows as floats; there may be half a million of them."""

    __slots__ = ("spec",)

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec

    @property
    @abstractmethod
    def name(self) -> str:
        """The source tensor that it begins with; empty where there is none."""

    @abstractmethod
    def bytes_of(self, start: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes] from byte ``start`` on."""

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, last axis]."""
        return self.spec.rows, self.spec.numel // max(self.spec.rows, 1)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, last axis]."""
        row = self.spec.row_bytes
        data = self.bytes_of(start * row, (stop - start) * row)
        with np.errstate(over="ignore", invalid="ignore"):
            return elements(data, self.spec).reshape(stop - start, -1).astype(np.float32)

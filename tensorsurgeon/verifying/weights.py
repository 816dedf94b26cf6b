"""A weight as float32 rows, whatever it is stored as: what both sides of a comparison are turned into.

Rows are decoded in pieces, so that a comparison holds a few megabytes. Layouts that pack along the outputs of a
transposed weight (GPTQ, AWQ, Quark) are read whole first: a quarter or an eighth of the weight in BF16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np

from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.tensors.spec import TensorSpec
from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.parts import Part


class Weight(Protocol):
    """A matrix [N, K] that can be read by rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, K]."""
        ...


@dataclass(frozen=True, slots=True)
class FloatWeight:
    """Rows ``first`` onwards of a float tensor, of which they may be a part (one expert of a stacked tensor)."""

    reader: TensorReader
    name: str
    shape: tuple[int, int]
    first: int = 0

    def rows(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, K]."""
        return self.reader.rows(self.name, self.first + start, self.first + stop).astype(np.float32)


class CodedWeight(ABC):
    """Codes with scales, ``w = (code - zero_point) * scale``; one subclass for each layout on disk.

    Made for tensors whose names, dtypes and shapes were found to be those of the claim (``parts``).
    """

    MAIN: ClassVar[str]
    """Local name of the tensor that holds the codes."""

    def __init__(self, reader: TensorReader, module: str, claim: Claim, shape: tuple[int, int]) -> None:
        self.reader, self.module, self.claim, self.shape = reader, module, claim, shape

    @classmethod
    @abstractmethod
    def shape_of(cls, main: TensorSpec, claim: Claim, stored: tuple[int, int] | None) -> tuple[int, int]:
        """[N, K] of the weight whose codes lie in ``main``, a matrix; ``stored``: what a ``weight_shape`` says."""

    @classmethod
    @abstractmethod
    def parts(cls, claim: Claim, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Every tensor that a module of this weight shape has under this claim, the optional ones too."""

    @abstractmethod
    def codes(self, start: int, stop: int) -> np.ndarray:
        """[stop - start, K]: integers, or float32 values of FP8 and FP4 codes."""

    @abstractmethod
    def read_scale(self) -> np.ndarray:
        """float32 [N, G], [1, 1] per tensor, or one for each block."""

    def read_zero_point(self) -> np.ndarray | None:
        """float32 [N, G] in the codes' own range, or None where codes are signed and have none."""
        return None

    def code_range(self) -> tuple[int, int] | None:
        """Least and largest code of an integer grid; None where codes are floats."""
        half = 1 << (self.claim.num_bits - 1)
        return -half, half - 1

    @cached_property
    def scale(self) -> np.ndarray:
        """What ``read_scale`` says."""
        return self.read_scale()

    @cached_property
    def zero_point(self) -> np.ndarray | None:
        """What ``read_zero_point`` says."""
        return self.read_zero_point()

    @cached_property
    def whole(self) -> np.ndarray:
        """The whole tensor of codes, for layouts that cannot be cut by outputs."""
        return self.array(self.MAIN)

    @cached_property
    def group_of_input(self) -> np.ndarray | None:
        """int [K]: the group of each input, where ``g_idx`` says that groups are no runs of inputs; else None."""
        if not self.claim.desc_act or f"{self.module}.g_idx" not in self.reader.specs:
            return None
        order = self.array("g_idx").astype(np.int64)
        size = self.shape[1] // self.scale.shape[1]
        return None if np.array_equal(order, np.arange(len(order)) // size) else order

    def array(self, local: str) -> np.ndarray:
        """A tensor of this module."""
        return self.reader.array(f"{self.module}.{local}")

    def local_rows(self, local: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor of this module."""
        return self.reader.rows(f"{self.module}.{local}", start, stop)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, K]: what readers compute."""
        return self.decoded(self.codes(start, stop), start, stop)

    def decoded(self, codes: np.ndarray, start: int, stop: int) -> np.ndarray:
        """float32 values of the codes of these rows; float codes are overwritten."""
        values = codes.astype(np.float32, copy=False)
        scale = self.scale_rows(start, stop)
        if self.group_of_input is not None:
            if self.zero_point is not None:
                values -= self.zero_point[start:stop, self.group_of_input]
            values *= scale[:, self.group_of_input]
            return values
        if self.claim.block is not None:
            values *= np.repeat(scale, self.claim.block[1], axis=1)[:, : self.shape[1]]
            return values
        grouped = values.reshape(stop - start, scale.shape[1], -1)
        if self.zero_point is not None:
            grouped -= self.zero_point[start:stop, :, None]
        grouped *= scale[:, :, None]
        return values

    def scale_rows(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start or 1, G]: the scales of these rows."""
        if self.claim.block is not None:
            return self.scale[np.arange(start, stop) // self.claim.block[0]]
        return self.scale if len(self.scale) == 1 else self.scale[start:stop]


def groups_of(claim: Claim, columns: int) -> int:
    """Scales along one row; a group that does not divide the row is a fault of its own."""
    if claim.block is not None:
        return -(-columns // claim.block[1])
    return 1 if claim.group_size < 1 else columns // claim.group_size


def scale_shapes(claim: Claim, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """Shapes that the scales of a weight [N, K] may have where they are not transposed."""
    rows, columns = shape
    if claim.block is not None:
        return ((-(-rows // claim.block[0]), groups_of(claim, columns)),)
    if claim.group_size == 0:
        return ((1,), ()) if claim.vector_scale else ((1,), (), (1, 1))
    if claim.group_size == -1 and claim.vector_scale:
        return ((rows,),)
    return ((rows, groups_of(claim, columns)),)

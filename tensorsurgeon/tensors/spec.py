"""Header facts: what a tensor is, without its bytes.

Named tuples instead of frozen dataclasses: a plan of the 35 B model holds some 200,000 of these, and a tuple is
built in a third of the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

from tensorsurgeon.tensors.dtypes import DType


class TensorSpec(NamedTuple):
    """Name, element type and shape of one tensor."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk; types narrower than a byte are packed without gaps."""
        return prod(self[2]) * self[1].bits >> 3

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as ``[-1, last axis]``; a vector has one row per element, a scalar one."""
        shape = self.shape
        return shape[0] if len(shape) == 1 else prod(shape[:-1])

    @property
    def row_bytes(self) -> int:
        return (self.shape[-1] if len(self.shape) > 1 else 1) * self.dtype.bits // 8

    @property
    def module(self) -> str:
        """The name without its last part: the module that owns this tensor."""
        return self.name.rpartition(".")[0]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype.name}{list(self.shape)}"


class Region(NamedTuple):
    """A run of rows of a tensor seen as ``[-1, last axis]``: one contiguous range of bytes.

    ``start`` and ``stop`` count rows; None means the whole tensor. The rows of a vector are its elements, so that
    a run of per-channel scales is a region too.
    """

    spec: TensorSpec
    start: int | None = None
    stop: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that stands for this region."""
        if self.start is None or self.stop is None:
            return self.spec.shape
        rows = self.stop - self.start
        return (rows,) if len(self.spec.shape) == 1 else (rows, self.spec.shape[-1])

    @property
    def byte_range(self) -> tuple[int, int]:
        """First byte and byte count within the tensor."""
        spec, start, stop = self
        if start is None or stop is None:
            return 0, spec.nbytes
        row_bytes = spec.row_bytes
        return start * row_bytes, (stop - start) * row_bytes

    def __str__(self) -> str:
        return self.spec.name if self.start is None else f"{self.spec.name}[{self.start}:{self.stop}]"


class SpecMap(dict[str, TensorSpec]):
    """Tensor specs by name, in the canonical order, with the model's ``config.json`` for rules that need it."""

    def __init__(self, specs: Iterable[TensorSpec] = (), config: Mapping[str, Any] | None = None) -> None:
        super().__init__((s.name, s) for s in specs)
        self.config: Mapping[str, Any] = config or {}
        # What is known of the model these make; whoever knows models puts it here, once (``models.describe``).
        self.model: object = None
        # Weights that a step unpacked from codes and that no step has rounded or quantized since; None before any was:
        # afterwards the config speaks of codes that are gone.
        self.unpacked: frozenset[str] | None = None

    def config_value(self, key: str) -> Any:
        """A key of the text model's config, looked up in ``text_config`` first; None if absent."""
        for part in (self.config.get("text_config"), self.config):
            if isinstance(part, Mapping) and part.get(key) is not None:
                return part[key]
        return None

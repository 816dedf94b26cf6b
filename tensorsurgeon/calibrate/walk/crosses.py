"""Cross products of what linears see behind quantized and behind original layers, beside the sums of ``statistics``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from tensorsurgeon.quant.gptq.asymmetric import CrossAccumulator


class CrossSum(Protocol):
    """Sums ``(o - x)^T x`` over tokens; o is the input of the same token behind original layers."""

    def add(self, inputs: Tensor, original: Tensor) -> None:
        """Take both inputs of the same tokens, [..., in_features]."""
        ...

    def result(self) -> Tensor:
        """The sum so far, a new tensor."""
        ...


class Crosses:
    """One sum by name; a linear that is not called once with every token of a batch has none, for then nothing pairs tokens."""

    def __init__(self, new: Callable[[int], CrossSum] = CrossAccumulator) -> None:
        self._new = new
        self._sums: dict[str, CrossSum | None] = {}

    def add(self, name: str, inputs: Sequence[Tensor], original: Sequence[Tensor], tokens: int) -> None:
        """Take what a linear was called with in a batch of so many ``tokens``; by one thread at a time for each name."""
        shapes = {tensor.shape for tensor in (*inputs, *original)}
        if len(inputs) != 1 or len(original) != 1 or len(shapes) != 1 or inputs[0][..., 0].numel() != tokens:
            self._sums[name] = None
            return
        if name not in self._sums:
            self._sums[name] = self._new(inputs[0].shape[-1])
        known = self._sums[name]
        if known is not None:
            known.add(inputs[0], original[0])

    def pop(self, name: str) -> Tensor | None:
        """The sum, which is let go."""
        known = self._sums.pop(name, None)
        return None if known is None else known.result()

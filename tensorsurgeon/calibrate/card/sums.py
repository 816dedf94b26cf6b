"""Second moments summed on the card: F32, a fixed number of tokens per product, in the order of tokens."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tensorsurgeon.errors import NumericError

# Tokens per product. Part of the result's bits, so never a tuning knob: the tensor cores' own sums lose digits over more
# (against F64 1.3e-4 relative over 32,768 tokens in one product).
CHUNK_TOKENS: Final = 4096


class CardSum:
    """Sums ``x x^T`` over tokens; one thread adds, in the order of tokens."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.in_features = in_features
        self.tokens = 0
        self._total = torch.zeros(in_features, in_features, device=device)

    def add(self, inputs: Tensor) -> None:
        """Take inputs of any float dtype, [..., in_features]."""
        if inputs.shape[-1] != self.in_features:
            raise NumericError(f"calibration inputs have {inputs.shape[-1]} features, the layer takes {self.in_features}")
        rows = inputs.detach().reshape(-1, self.in_features)
        self.tokens += len(rows)
        add_outer(self._total, rows)

    def result(self) -> Tensor:
        """The sum so far, exactly symmetric; a new tensor."""
        return mirrored(self._total)


class CardCross:
    """Sums ``(o - x)^T x`` over tokens, o being the input of the same token behind original layers; as ``CardSum`` adds."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.in_features = in_features
        self._total = torch.zeros(in_features, in_features, device=device)

    def add(self, inputs: Tensor, original: Tensor) -> None:
        """Take both inputs of the same tokens, [..., in_features]."""
        add_cross(self._total, *(part.detach().reshape(-1, self.in_features) for part in (inputs, original)))

    def result(self) -> Tensor:
        """The sum so far; a new tensor."""
        return self._total.clone()


def add_cross(total: Tensor, rows: Tensor, original: Tensor) -> None:
    """total [K, K] += (original - rows)^T rows, a chunk at a time."""
    for start in range(0, len(rows), CHUNK_TOKENS):
        chunk = rows[start : start + CHUNK_TOKENS].float()
        total += (original[start : start + CHUNK_TOKENS].float() - chunk).T @ chunk


def add_outer(total: Tensor, rows: Tensor) -> None:
    """total [K, K] += rows^T rows, a chunk at a time."""
    for start in range(0, len(rows), CHUNK_TOKENS):
        chunk = rows[start : start + CHUNK_TOKENS]
        if chunk.is_cuda and chunk.dtype in (torch.bfloat16, torch.float16):
            # Products of two such numbers are exact in F32, so nothing is lost but in the sum.
            total += torch.mm(chunk.T, chunk, out_dtype=torch.float32)
        else:
            chunk = chunk.float()
            total += chunk.T @ chunk


def mirrored(total: Tensor) -> Tensor:
    """[..., K, K] made exactly symmetric from its lower half."""
    return torch.tril(total) + torch.tril(total, -1).mT

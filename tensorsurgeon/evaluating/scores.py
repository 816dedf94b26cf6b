"""Distances between two models' predictions, token by token, from logits that come in pieces of the vocabulary.

No token's logits ever exist as a whole: sums over the vocabulary are carried along with the largest logit so far, and
rescaled when a larger one comes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Predictions:
    """What one model predicts for tokens [samples, length]: the sum over the vocabulary, the likeliest token, and its own.

    Logits go in with ``add``; any thread, each sample in one thread at a time.
    """

    def __init__(self, tokens: Tensor) -> None:
        shape = tokens.shape
        self._following = torch.cat((tokens[:, 1:], tokens[:, :1] * 0 - 1), 1)
        self.largest = torch.full(shape, -torch.inf, dtype=torch.float64)
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.likeliest = torch.zeros(shape, dtype=torch.int64)
        self.said = torch.full(shape, -torch.inf, dtype=torch.float64)

    def add(self, start: int, first_row: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits F32 [b, length, rows] of samples from ``start`` and the vocabulary from ``first_row``.

        Returns what sums over the vocabulary that were taken so far are to be multiplied by [b, length], and the
        exponentials of these logits, relative to the largest logit so far.
        """
        rows = slice(start, start + len(logits))
        best, index = logits.max(-1)
        before = self.largest[rows].clone()
        now = torch.maximum(before, best.double().cpu())
        self.likeliest[rows] = torch.where(best.cpu() > before, index.cpu() + first_row, self.likeliest[rows])
        self.largest[rows] = now
        shrunk = torch.exp(before - now)
        powers = torch.exp(logits - now.to(logits)[..., None])
        self.total[rows] = self.total[rows] * shrunk + powers.sum(-1, dtype=torch.float64).cpu()
        wanted = self._following[rows] - first_row
        is_here = (wanted >= 0) & (wanted < logits.shape[-1])
        picked = logits.gather(-1, wanted.clamp(0, logits.shape[-1] - 1)[..., None].to(logits.device))[..., 0]
        self.said[rows] = torch.where(is_here, picked.double().cpu(), self.said[rows])
        return shrunk, powers

    @property
    def normalizer(self) -> Tensor:
        """log of the sum of exponentials [samples, length]."""
        return self.largest + self.total.log()

    @property
    def nll(self) -> Tensor:
        """Negative log likelihood of each next token [samples, length]; that of the last position means nothing."""
        return self.normalizer - self.said


class Divergence:
    """Sums that make KL(source || target) and KL(target || source) of each token [samples, length]."""

    def __init__(self, shape: torch.Size) -> None:
        self._forward = torch.zeros(shape, dtype=torch.float64)
        self._reverse = torch.zeros(shape, dtype=torch.float64)

    def add(self, start: int, source: Piece, target: Piece) -> None:
        """One piece of the vocabulary; what ``Predictions.add`` gave for each model goes in with its logits."""
        rows = slice(start, start + len(source.logits))
        apart = source.logits - target.logits
        for sums, piece, sign in ((self._forward, source, 1.0), (self._reverse, target, -1.0)):
            here = (piece.powers * apart).sum(-1, dtype=torch.float64).cpu() * sign
            sums[rows] = sums[rows] * piece.shrunk + here

    def of(self, source: Predictions, target: Predictions) -> tuple[Tensor, Tensor]:
        """KL(source || target) and KL(target || source) [samples, length]; rounding may leave a hair below zero."""
        apart = source.normalizer - target.normalizer
        return self._forward / source.total - apart, self._reverse / target.total + apart


class Piece(NamedTuple):
    """Logits F32 [b, length, rows] of a piece of the vocabulary, and what ``Predictions.add`` said of them."""

    logits: Tensor
    shrunk: Tensor
    powers: Tensor

"""A target that leans towards what the original inputs would have given, so that a layer makes up for those before it.

GPTQ keeps a layer's outputs on the inputs that it will really get, ``X_q``, behind layers already quantized, and takes their
errors as given. GPTAQ (arXiv 2504.02692) wants the outputs on the original inputs ``X_o`` instead. In closed form, and only a
share ``a`` of the way: with ``H = X_q^T X_q`` and ``C = (X_o - X_q)^T X_q``, quantize

    W* = W + a W C (H + ridge)^-1

under ``H`` instead of ``W``. The ridge pulls towards ``W``, for few tokens say little about what has gone wrong. Without errors
in earlier layers ``C`` is 0 and ``W*`` is ``W``.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tensorsurgeon.errors import NumericError
from tensorsurgeon.quant.gptq.hessian import CHUNK_TOKENS, flipped_cholesky
from tensorsurgeon.quant.threads import one_torch_thread

# Share of the Hessian's mean diagonal added to it before it is inverted.
RIDGE: Final = 0.03


class CrossAccumulator:
    """Sums ``(X_o - X_q)^T X_q`` in F32, with the same bits however the tokens were cut into batches.

    Tokens are regrouped as ``HessianAccumulator`` does. Memory: in_features^2 floats, and a chunk of both inputs.
    """

    def __init__(self, in_features: int) -> None:
        self.in_features = in_features
        self._total = torch.zeros(in_features, in_features, dtype=torch.float32)
        # The difference and the inputs side by side.
        self._pending = torch.empty(CHUNK_TOKENS, 2 * in_features, dtype=torch.float32)
        self._pending_tokens = 0

    def add(self, inputs: Tensor, original: Tensor) -> None:
        """Take inputs behind quantized layers and behind original ones, of the same tokens; both [..., in_features]."""
        if inputs.shape != original.shape or inputs.shape[-1] != self.in_features:
            raise NumericError(f"inputs {list(inputs.shape)} and original ones {list(original.shape)} are not of the same tokens")
        now, before = (part.detach().reshape(-1, self.in_features) for part in (inputs, original))
        start = 0
        while start < len(now):
            stop = min(len(now), start + CHUNK_TOKENS - self._pending_tokens)
            room = self._pending[self._pending_tokens : self._pending_tokens + stop - start]
            room[:, self.in_features :] = now[start:stop]
            room[:, : self.in_features] = before[start:stop]
            room[:, : self.in_features] -= room[:, self.in_features :]
            self._pending_tokens += stop - start
            if self._pending_tokens == CHUNK_TOKENS:
                self._add(self._total, self._pending)
                self._pending_tokens = 0
            start = stop

    @one_torch_thread()
    def _add(self, total: Tensor, rows: Tensor) -> None:
        total.addmm_(rows[:, : self.in_features].T, rows[:, self.in_features :])

    def result(self) -> Tensor:
        """The sum over every token so far, [in_features, in_features]; a new tensor."""
        total = self._total.clone()
        if self._pending_tokens:
            self._add(total, self._pending[: self._pending_tokens].clone())
        return total


@one_torch_thread()
def correction(cross: Tensor, hessian: Tensor, ridge: float = RIDGE) -> Tensor | None:
    """``C (H + ridge)^-1`` [K, K] F32; None where the Hessian saw nothing but zeros. Raises as ``flipped_cholesky`` does."""
    if cross.shape != hessian.shape or not bool(torch.isfinite(cross.abs().max())):
        raise NumericError(
            f"cross products {list(cross.shape)} beside a Hessian {list(hessian.shape)} are not finite or do not fit"
        )
    factor = flipped_cholesky(hessian, ridge, "none")
    if factor is None:
        return None
    solved = torch.empty_like(cross)
    solved[factor.order] = torch.cholesky_solve(cross.T[factor.order], factor.lower)
    return solved.T.contiguous()


def leaning(weight: Tensor, step: Tensor, share: float) -> Tensor:
    """``W*`` for a weight [N, K] F32 and the ``correction`` of its inputs."""
    return torch.addmm(weight, weight, step, alpha=share)

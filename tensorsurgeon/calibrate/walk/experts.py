"""Stacked experts: what each is fed, and the statistics of its two projections.

The walk keeps what went into a layer's experts and where the router sent it. From that, expert by expert, the rows are
gathered, the first projection is run, and the Hessians are summed: no expert's input is held for longer than its turn.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.stacks import ExpertStack
from tensorsurgeon.quant.gptq.asymmetric import CrossAccumulator
from tensorsurgeon.quant.gptq.hessian import CHUNK_TOKENS, HessianAccumulator

logger = logging.getLogger(__name__)

# Tokens per call of an expert, and per read of its inputs; fixed, for kernels may differ with the shape.
_TOKENS: Final = 8 * CHUNK_TOKENS


class InputStatistics(NamedTuple):
    """What a linear's input looked like: sum of ``x x^T`` [in, in] F32 over so many tokens, and its diagonal.

    ``cross``: sum of ``(o - x)^T x`` as rows, o being the input behind original layers; None where that was not carried.
    """

    tokens: int
    diagonal: Tensor
    hessian: Tensor
    cross: Tensor | None = None


def wanted_tokens(options: CalibrationOptions, counts: np.ndarray) -> int:
    """Up to how many tokens an expert is topped up; ``counts`` [experts] are what the router sent.

    No more than an even router would send: with little text the rest of it is what the expert never sees, and fitting
    that costs more than it gives (0.016 against 0.009 on held-out tokens, from 256 tokens in all).
    """
    return min(options.minimum_tokens, int(counts.sum()) // len(counts))


class Fed(Protocol):
    """What experts are fed from."""

    def gather(self, tokens: np.ndarray | slice) -> Tensor:
        """Hidden states [t, hidden] of these tokens; a new tensor."""
        ...


class ExpertRows(NamedTuple):
    """Hidden states [tokens, hidden] in a file."""

    path: Path
    tokens: int
    features: int
    dtype: torch.dtype

    def gather(self, tokens: np.ndarray | slice) -> Tensor:
        """Hidden states [t, hidden] of these tokens; a new tensor."""
        mapped = np.memmap(self.path, np.uint8, "r", shape=(self.tokens, self.features * self.dtype.itemsize))
        return torch.from_numpy(np.array(mapped[tokens])).view(self.dtype)


class ExpertInputs:
    """What went into one stack of experts: hidden states in a scratch file, chosen experts in memory.

    Single rows are picked from all over the file, hundreds of thousands per layer, so it is mapped for that; each mapping
    is let go at once, or the whole file would count as this process's memory.
    """

    def __init__(self, path: Path, tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
        self._states = HiddenStates(path, (tokens, hidden_size), dtype, create=True, is_scratch=True)
        self.tokens = tokens
        self._index: np.ndarray | None = None

    def prepare(self, top_k: int) -> None:
        """Make room for ``top_k`` choices per token; called before ``add``."""
        if self._index is None:
            self._index = np.full((self.tokens, top_k), -1, np.int32)

    def add(self, first_token: int, hidden: Tensor, chosen: Tensor) -> None:
        """Inputs [t, hidden] and chosen experts [t, k] of tokens from ``first_token`` on; any thread, any order."""
        assert self._index is not None
        rows = slice(first_token, first_token + len(chosen))
        self._states.write(first_token, hidden)
        self._index[rows] = chosen.numpy()

    def routed(self, expert: int) -> np.ndarray:
        """Tokens that the router sent to an expert, in order."""
        assert self._index is not None
        return np.flatnonzero((self._index == expert).any(1))

    def counts(self, experts: int) -> np.ndarray:
        """How many tokens each expert got."""
        assert self._index is not None
        return np.bincount(self._index[self._index >= 0].reshape(-1), minlength=experts)[:experts]

    @property
    def states(self) -> HiddenStates:
        """The scratch file."""
        return self._states

    @property
    def rows(self) -> ExpertRows:
        """The same for whoever only reads."""
        return ExpertRows(self._states.path, self.tokens, self._states.shape[1], self._states.dtype)

    def note(self, first_token: int, shape: tuple[int, ...], dtype: torch.dtype, chosen: np.ndarray) -> None:
        """Another process has written the inputs of tokens from ``first_token`` on; ``chosen`` are their experts [t, k]."""
        self.prepare(chosen.shape[1])
        assert self._index is not None
        self._states.note(shape, dtype, {})
        self._index[first_token : first_token + len(chosen)] = chosen

    def gather(self, tokens: np.ndarray | slice) -> Tensor:
        """Hidden states [t, hidden] of these tokens; a new tensor."""
        return self.rows.gather(tokens)

    def close(self) -> None:
        """Remove the scratch file."""
        self._states.close()
        self._states.path.unlink(missing_ok=True)


class ExpertStatistics:
    """Statistics of one stack's projections, computed when asked for; thread-safe after ``choose``.

    ``originals``: what goes into the stack behind original layers, where that is carried.
    """

    def __init__(
        self, stack: ExpertStack, inputs: ExpertInputs, options: CalibrationOptions, originals: ExpertInputs | None = None
    ) -> None:
        self.stack = stack
        self._inputs = inputs
        self._originals = originals
        self._options = options
        self._extra: dict[int, np.ndarray] = {}

    def choose(self, router: Tensor | None) -> None:
        """Decide what tops up cold experts: the tokens whose logits under ``router`` [E, hidden] are highest."""
        if self._options.experts != "balanced":
            return
        counts = self._inputs.counts(self.stack.experts)
        wanted = wanted_tokens(self._options, counts)
        cold = np.flatnonzero(counts < wanted)
        if not len(cold):
            return
        if router is None:
            logger.warning("%s: %s; %d cold experts are not topped up", self.stack.name, self.stack.why_cold, len(cold))
            return
        logits = np.empty((self._inputs.tokens, len(cold)), np.float32)
        rows = router[torch.from_numpy(cold)].float().T.contiguous()
        for start in range(0, self._inputs.tokens, _TOKENS):
            stop = min(start + _TOKENS, self._inputs.tokens)
            logits[start:stop] = (self._inputs.gather(slice(start, stop)).float() @ rows).numpy()
        for column, expert in enumerate(cold.tolist()):
            mine = self._inputs.routed(expert)
            values = logits[:, column].copy()
            values[mine] = -np.inf
            # Stable, so that equal logits are taken in the order of tokens.
            best = np.argsort(-values, kind="stable")[: wanted - len(mine)]
            self._extra[expert] = best

    def tokens_of(self, expert: int) -> np.ndarray:
        """The tokens an expert is fed, in order."""
        if self._options.experts == "all":
            return np.arange(self._inputs.tokens)
        mine = self._inputs.routed(expert)
        extra = self._extra.get(expert)
        return mine if extra is None else np.sort(np.concatenate([mine, extra]))

    def compute(self, expert: int, *, first: bool) -> tuple[InputStatistics | None, InputStatistics]:
        """Of an expert's first projection (if asked for) and of its down projection; original weights."""
        return fed_statistics(self.stack, expert, self.tokens_of(expert), self._inputs, self._originals, first=first)


def fed_statistics(
    stack: ExpertStack, expert: int, chosen: np.ndarray, inputs: Fed, originals: Fed | None, *, first: bool
) -> tuple[InputStatistics | None, InputStatistics]:
    """Of the first projection (if asked for) and the down projection of an expert that is fed the tokens ``chosen``."""
    crossed = originals is not None
    before = _Sums(stack.hidden, crossed) if first else None
    after = _Sums(stack.inner, crossed)
    for start in range(0, len(chosen), _TOKENS):
        tokens = chosen[start : start + _TOKENS]
        hidden = [each.gather(tokens) for each in (inputs, originals) if each is not None]
        if before is not None:
            before.add(*hidden)
        after.add(*(stack.down_inputs(expert, states) for states in hidden))
    return (None if before is None else before.result()), after.result()


class _Sums:
    """A Hessian, and cross products beside it where both inputs are carried."""

    def __init__(self, in_features: int, crossed: bool) -> None:
        self._hessian = HessianAccumulator(in_features)
        self._cross = CrossAccumulator(in_features) if crossed else None

    def add(self, inputs: Tensor, original: Tensor | None = None) -> None:
        self._hessian.add(inputs)
        if self._cross is not None and original is not None:
            self._cross.add(inputs, original)

    def result(self) -> InputStatistics:
        hessian = self._hessian.result()
        cross = None if self._cross is None else self._cross.result()
        return InputStatistics(self._hessian.tokens, hessian.diagonal().clone(), hessian, cross)

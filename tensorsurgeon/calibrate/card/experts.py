"""What a layer's experts are fed, on the card, and the statistics of many experts at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.calibrate.card.states import Place, host_buffer
from tensorsurgeon.calibrate.card.sums import CHUNK_TOKENS, add_cross, add_outer, mirrored
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.walk.experts import wanted_tokens
from tensorsurgeon.calibrate.walk.hidden import HiddenStates
from tensorsurgeon.calibrate.walk.stacks import ExpertStack

logger = logging.getLogger(__name__)

# Tokens on the card at once where they do not lie there; sums are cut by it wherever they lie, so that bits stay.
WINDOW_TOKENS: Final = 65_536
# Cold experts whose logits are held at once.
_COLD_TOGETHER: Final = 32


class CardInputs:
    """Hidden states that went into one stack of experts, and where the router sent them; one thread adds and reads."""

    def __init__(
        self, path: Path, tokens: int, hidden_size: int, dtype: torch.dtype, *, device: torch.device, place: Place
    ) -> None:
        self.tokens = tokens
        self.device = device
        self._index: Tensor | None = None
        self._memory: Tensor | None = None
        self._file: HiddenStates | None = None
        if place == "card":
            self._memory = torch.empty(tokens, hidden_size, dtype=dtype, device=device)
        elif place == "pinned":
            self._memory = host_buffer((tokens, hidden_size), dtype, device)
        else:
            self._file = HiddenStates(path, (tokens, hidden_size), dtype, create=True, is_scratch=True)

    def prepare(self, top_k: int) -> None:
        """Make room for ``top_k`` choices per token; called before ``add``."""
        if self._index is None:
            self._index = torch.full((self.tokens, top_k), -1, dtype=torch.int32, device=self.device)

    @property
    def index(self) -> Tensor:
        """Chosen experts [tokens, k]."""
        if self._index is None:
            raise RuntimeError("the experts were never called")
        return self._index

    def add(self, first_token: int, hidden: Tensor, chosen: Tensor) -> None:
        """Inputs [t, hidden] and chosen experts [t, k] of tokens from ``first_token`` on."""
        rows = slice(first_token, first_token + len(chosen))
        self.index[rows] = chosen.int()
        if self._memory is not None:
            self._memory[rows].copy_(hidden, non_blocking=True)
        elif self._file is not None:
            self._file.write(first_token, hidden)

    def window(self, start: int, stop: int) -> Tensor:
        """Hidden states [t, hidden] of a run of tokens, on the card."""
        if self._memory is not None:
            return self._memory[start:stop].to(self.device, non_blocking=True)
        assert self._file is not None
        return self._file.read(start, stop).to(self.device)

    def close(self) -> None:
        """Let go of everything."""
        self._memory = None
        if self._file is not None:
            self._file.close()
            self._file.path.unlink(missing_ok=True)


class CardExperts:
    """Sums of a stack's experts over the tokens that each is fed; ``originals`` went in behind original layers, where carried."""

    def __init__(
        self,
        stack: ExpertStack,
        inputs: CardInputs,
        options: CalibrationOptions,
        router: Tensor | None,
        originals: CardInputs | None = None,
    ) -> None:
        self.stack = stack
        self._inputs = inputs
        self._originals = originals
        self._takes_all = options.experts == "all"
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._ends = np.zeros((0, 0), np.int64)
        if not self._takes_all:
            self._sort(self._extra(options, router))

    def _extra(self, options: CalibrationOptions, router: Tensor | None) -> list[tuple[int, Tensor]]:
        """What tops up cold experts: the tokens whose logits under ``router`` [E, hidden] are highest."""
        if options.experts != "balanced":
            return []
        index = self._inputs.index.flatten().long()
        counts = torch.bincount(index[index >= 0], minlength=self.stack.experts)[: self.stack.experts].cpu().numpy()
        wanted = wanted_tokens(options, counts)
        cold = np.flatnonzero(counts < wanted)
        if not len(cold):
            return []
        if router is None:
            logger.warning("%s: %s; %d cold experts are not topped up", self.stack.name, self.stack.why_cold, len(cold))
            return []
        extra = []
        for first in range(0, len(cold), _COLD_TOGETHER):
            some = torch.from_numpy(cold[first : first + _COLD_TOGETHER]).to(self._inputs.device)
            rows = router[some].float()
            logits = torch.cat([rows @ self._inputs.window(a, b).float().T for a, b in self._windows()], 1)
            for place, expert in enumerate(some.tolist()):
                logits[place, (self._inputs.index == expert).any(1)] = float("-inf")
            # Stable, so that equal logits are taken in the order of tokens.
            best = torch.sort(logits, dim=1, descending=True, stable=True).indices
            extra += [(e, best[n, : wanted - int(counts[e])]) for n, e in enumerate(some.tolist())]
        return extra

    def _windows(self) -> list[tuple[int, int]]:
        return [(a, min(a + WINDOW_TOKENS, self._inputs.tokens)) for a in range(0, self._inputs.tokens, WINDOW_TOKENS)]

    def _sort(self, extra: list[tuple[int, Tensor]]) -> None:
        """Pairs of expert and token in the order of experts, then of tokens, and where each window of each expert ends."""
        total = self._inputs.tokens
        index = self._inputs.index.long()
        tokens = torch.arange(total, device=index.device)[:, None].expand_as(index)
        keys = (index * total + tokens)[index >= 0]
        keys = torch.sort(torch.cat([keys, *(expert * total + some for expert, some in extra)])).values
        self._tokens = keys % total
        starts = torch.tensor([a for a, _ in self._windows()], device=index.device)
        wanted = (torch.arange(self.stack.experts + 1, device=index.device)[:, None] * total + starts).flatten()
        self._ends = torch.searchsorted(keys, wanted).cpu().numpy().reshape(self.stack.experts + 1, -1)

    def tokens_of(self, expert: int) -> int:
        """How many tokens an expert is fed."""
        if self._takes_all:
            return self._inputs.tokens
        return int(self._ends[expert + 1, 0] - self._ends[expert, 0])

    def sums(self, experts: Sequence[int], *, first: bool) -> tuple[Tensor, Tensor | None]:
        """Hessians and, where originals are carried, cross products, F32 [len(experts), K, K] each.

        Of the first projections' inputs, or of the down projections' under original weights.
        """
        columns = self.stack.hidden if first else self.stack.inner
        hessians = torch.zeros(len(experts), columns, columns, device=self._inputs.device)
        crosses = None if self._originals is None else torch.zeros_like(hessians)
        for number, (start, stop) in enumerate(self._windows()):
            windows = [inputs.window(start, stop) for inputs in (self._inputs, self._originals) if inputs is not None]
            for place, expert in enumerate(experts):
                rows = self._rows(expert, number, start, stop)
                for begin in range(0, stop - start if rows is None else len(rows), CHUNK_TOKENS):
                    piece = slice(begin, begin + CHUNK_TOKENS)
                    hidden = [window[piece] if rows is None else window.index_select(0, rows[piece]) for window in windows]
                    if not first:
                        hidden = [self.stack.down_inputs(expert, states) for states in hidden]
                    add_outer(hessians[place], hidden[0])
                    if crosses is not None:
                        add_cross(crosses[place], *hidden)
        return mirrored(hessians), crosses

    def _rows(self, expert: int, window: int, start: int, stop: int) -> Tensor | None:
        """Which rows of a window an expert is fed; None for all."""
        if self._takes_all:
            return None
        begin = self._ends[expert, window]
        end = self._ends[expert, window + 1] if window + 1 < self._ends.shape[1] else self._ends[expert + 1, 0]
        return self._tokens[int(begin) : int(end)] - start

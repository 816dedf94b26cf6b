"""What models predict after their last layer: logits of a piece of the vocabulary at a time, and sums over it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch

from tensorsurgeon.calibrate.walk.head import PIECE_ROWS
from tensorsurgeon.calibrate.walk.workers import run_parallel
from tensorsurgeon.errors import NumericError
from tensorsurgeon.evaluating.scores import Divergence, Piece, Predictions
from tensorsurgeon.evaluating.side import Side
from tensorsurgeon.evaluating.step import Step
from tensorsurgeon.evaluating.text import Text


class Scores(NamedTuple):
    """``predictions`` of each model; ``divergences`` of each target from the source, empty without one."""

    predictions: list[Predictions]
    divergences: list[Divergence]


def predict(
    sides: Sequence[Side],
    text: Text,
    has_source: bool,
    *,
    workers: int,
    stop: threading.Event,
    progress: Callable[[Step], None],
) -> Scores:
    """Score every token by every model; NumericError for logits that are not finite."""
    ids = torch.from_numpy(text.tokens)
    predictions = [Predictions(ids) for _ in sides]
    divergences = [Divergence(ids.shape) for _ in sides[1:]] if has_source else []
    heads = [side.head() for side in sides]
    rows = min(head.vocabulary for head in heads)
    walk = sides[0].walk
    assert walk is not None
    # A batch of the walk has too many tokens for logits and the sums made of them, on every worker at once.
    size = max(1, 1024 // ids.shape[1])
    batches = [(at, min(at + size, len(ids))) for at in range(0, len(ids), size)]
    with ExitStack() as held:
        opened = [held.enter_context(head.open()) for head in heads]
        for first in range(0, rows, PIECE_ROWS):
            last = min(first + PIECE_ROWS, rows)
            progress(Step(first, rows, "logits"))
            pieces = [rows_of(first, last) for rows_of in opened]

            def work(batch: int) -> None:
                start, stop_at = batches[batch]  # run before the next piece
                made = []
                for k, side in enumerate(sides):
                    assert side.states is not None
                    logits = pieces[k](side.states.read(start, stop_at), ids[start:stop_at])  # noqa: B023
                    if not bool(torch.isfinite(logits).all()):
                        raise NumericError(f"{side.path}: logits are not finite; it predicts nothing for this text")
                    made.append(Piece(logits, *predictions[k].add(start, first, logits)))  # noqa: B023
                for divergence, piece in zip(divergences, made[1:], strict=has_source):
                    divergence.add(start, made[0], piece)

            run_parallel(len(batches), work, workers=workers, stop=stop)
    return Scores(predictions, divergences)

"""What models are asked to predict: text in sequences of one length, or lists of token ids, each a sequence of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.calibrate.data.data import CalibrationData, load_data
from tensorsurgeon.calibrate.data.documents import open_documents
from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource
from tensorsurgeon.errors import RecipeError
from tensorsurgeon.evaluating.options import TextOptions

# Fewer say little: see docs/evaluation.md.
FEW_SEQUENCES: Final = 8


@dataclass(frozen=True)
class Text:
    """``tokens`` int64 [samples, length], padded behind where ``lengths`` are smaller: no token sees what follows it."""

    tokens: np.ndarray
    lengths: np.ndarray
    described: dict[str, Any]

    @property
    def counted(self) -> Tensor:
        """Which positions are text [samples, length]."""
        return torch.arange(self.tokens.shape[1])[None] < torch.from_numpy(self.lengths)[:, None]

    @property
    def scored(self) -> Tensor:
        """Which positions have a next token to predict."""
        return torch.arange(1, self.tokens.shape[1] + 1)[None] < torch.from_numpy(self.lengths)[:, None]


def load_text(options: TextOptions, root: Path, vocabulary_rows: int) -> Text:
    """The tokens to walk, by the tokenizer of the checkpoint in ``root``; RecipeError for files that give none."""
    if not options.locations:
        raise RecipeError("evaluation needs a text", remedy="; give {text} a file of text, JSON lines, Parquet or token ids")
    kinds = {location: open_documents(location) for location in options.locations}
    are_ids = {location: documents.kind == "token ids" for location, documents in kinds.items()}
    if any(are_ids.values()) and not all(are_ids.values()):
        text, ids = ([name for name, is_ids in are_ids.items() if is_ids is wanted] for wanted in (False, True))
        raise RecipeError(f"text: {ids[0]} holds token ids and {text[0]} text; evaluate on one kind at a time")
    if all(are_ids.values()):
        return _of_ids(options, [np.asarray(d.read(n)) for d in kinds.values() for n in range(d.count)], kinds, vocabulary_rows)
    sources = tuple(DataSource(location) for location in options.locations)
    drawn = CalibrationOptions(
        sources=sources, samples=options.samples, sequence_length=options.sequence_length, seed=options.seed
    )
    data = load_data(drawn, root, vocabulary_rows)
    lengths = np.full(len(data.tokens), data.tokens.shape[1], np.int64)
    return Text(data.tokens, lengths, _described(data, int(lengths.sum()), {"seed": options.seed}))


def _of_ids(options: TextOptions, lists: list[np.ndarray], kinds: Any, vocabulary_rows: int) -> Text:
    lists = [ids[: options.sequence_length] for ids in lists[: options.samples]]
    for number, ids in enumerate(lists):
        if len(ids) < 2:
            raise RecipeError(f"text: list {number} has {len(ids)} token ids; two are needed, one to predict from the other")
        if int(ids.max()) >= vocabulary_rows:
            raise RecipeError(
                f"text: list {number} has token id {int(ids.max())}, but the model's vocabulary has {vocabulary_rows} rows; "
                "the token ids belong to another model"
            )
    lengths = np.array([len(ids) for ids in lists], np.int64)
    tokens = np.zeros((len(lists), int(lengths.max())), np.int64)
    for row, ids in zip(tokens, lists, strict=True):
        row[: len(ids)] = ids
    sources = tuple({"name": Path(name).name, "kind": d.kind, "digest": d.digest} for name, d in kinds.items())
    return Text(tokens, lengths, _described(CalibrationData(tokens, sources, ()), int(lengths.sum()), {}))


def _described(data: CalibrationData, tokens: int, more: dict[str, Any]) -> dict[str, Any]:
    sequences, length = data.tokens.shape
    sizes = {"sequences": sequences, "sequence_length": length, "tokens": tokens}
    return {**sizes, **more, "sources": list(data.sources), "digest": data.digest}

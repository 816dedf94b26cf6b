"""Calibration data: documents from several sources, packed into chunks of equal length, drawn by a seed.

Chunks are packed without padding: a padded token would be counted in every Hessian, and masks would differ by batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from tensorsurgeon.calibrate.data.documents import BUILTIN, Document, Documents, open_documents
from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource
from tensorsurgeon.errors import RecipeError

logger = logging.getLogger(__name__)

# So many chunks are packed for each one that is drawn, where there is text enough: neighbours in a long text are alike.
_CHOICE: Final = 4


@dataclass(frozen=True)
class CalibrationData:
    """``tokens`` int64 [samples, sequence_length], and where they came from (for the record)."""

    tokens: np.ndarray
    sources: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Names the very tokens, whatever files they came from."""
        shape = f"{self.tokens.shape}".encode()
        return f"xxh3_128:{xxhash.xxh3_128_hexdigest(shape + np.ascontiguousarray(self.tokens).tobytes())}"


def load_data(options: CalibrationOptions, checkpoint_root: Path, vocabulary_rows: int) -> CalibrationData:
    """Draw ``samples`` chunks from the sources by weight, with the checkpoint's own tokenizer.

    ``vocabulary_rows`` are the rows of the embedding: a token id beyond them means that the tokenizer is another
    model's. Raises RecipeError for sources that cannot be read or give no chunk.
    """
    encoder = _Encoder(checkpoint_root, vocabulary_rows)
    wanted = shares([source.weight for source in options.sources], options.samples)
    parts, described, notes = [], [], []
    for number, (source, count) in enumerate(zip(options.sources, wanted, strict=True)):
        if not count:
            notes.append(f"{source.location}: its share of {options.samples} samples is less than one; it is not used")
            continue
        documents = open_documents(source.location)
        draw = np.random.default_rng([options.seed, number])
        chunks = _chunks(source, documents, encoder, count, options.sequence_length, draw)
        if len(chunks) < count:
            notes.append(
                f"{source.location}: has {len(chunks)} chunks of {options.sequence_length} tokens, {count} were asked for"
            )
        if documents.kind == BUILTIN:
            notes.append("builtin is old English prose and a reference of Python: text like the model's own use serves it better")
        parts.append(chunks)
        name = source.location if documents.kind == "hub" else Path(source.location).name
        entry = {"name": name, "kind": documents.kind, "weight": source.weight, "samples": len(chunks)}
        described.append({**entry, "digest": documents.digest})
    tokens = np.concatenate(parts)
    tokens = tokens[np.random.default_rng(options.seed).permutation(len(tokens))]
    for note in notes:
        logger.warning("calibration data: %s", note)
    return CalibrationData(tokens, tuple(described), tuple(notes))


def shares(weights: Sequence[float], samples: int) -> list[int]:
    """``samples`` divided by weight, the largest remainders rounded up; ties by position."""
    exact = [weight / sum(weights) * samples for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda n: (counts[n] - exact[n], n))
    for number in by_remainder[: samples - sum(counts)]:
        counts[number] += 1
    return counts


def _chunks(
    source: DataSource, documents: Documents, encoder: _Encoder, count: int, length: int, draw: np.random.Generator
) -> np.ndarray:
    """At most ``count`` chunks [., length] out of documents in random order."""
    stream: list[np.ndarray] = []
    total = 0
    for number in draw.permutation(documents.count):
        ids = encoder.encode(documents.read(int(number)), source.location)
        stream.append(ids)
        total += len(ids)
        if total >= _CHOICE * count * length:
            break
    if total < length:
        raise RecipeError(
            f"{source.location}: has {total} tokens, fewer than one chunk of {length}",
            remedy="; give more text, or a smaller {sequence_length}",
        )
    tokens = np.concatenate(stream)
    chunks = tokens[: total // length * length].reshape(-1, length)
    return np.asarray(chunks[draw.permutation(len(chunks))[:count]])


class _Encoder:
    """The checkpoint's tokenizer, loaded when the first text comes; token ids need none."""

    def __init__(self, root: Path, vocabulary_rows: int) -> None:
        self._root = root
        self._rows = vocabulary_rows
        self._tokenizer: Any = None

    def encode(self, document: Document, where: str) -> np.ndarray:
        """Token ids of a document, an end-of-text token behind it where the tokenizer has one."""
        if isinstance(document, np.ndarray):
            return self._checked(document, where)
        tokenizer = self._loaded()
        text = document if isinstance(document, str) else self._chat_text(tokenizer, document, where)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        unknown = tokenizer.unk_token_id
        if unknown is not None and len(ids) >= 16 and ids.count(unknown) * 2 > len(ids):
            raise RecipeError(
                f"{where}: the tokenizer in {self._root} does not know {ids.count(unknown)} of {len(ids)} tokens; is it "
                "this model's?"
            )
        if not ids and len(text.strip()) >= 16:
            # What transformers makes of a folder without tokenizer.json knows no word and says nothing.
            raise RecipeError(
                f"{where}: the tokenizer in {self._root} makes no token of a text of {len(text)} characters; its vocabulary is "
                "missing, or it is another model's"
            )
        # Nothing is appended to an empty document: it would calibrate on the separator alone.
        if ids and tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        return self._checked(np.asarray(ids, np.int64), where)

    def _checked(self, ids: np.ndarray, where: str) -> np.ndarray:
        if ids.size and int(ids.max()) >= self._rows:
            raise RecipeError(
                f"{where}: token id {int(ids.max())}, but the model's vocabulary has {self._rows} rows; the tokenizer or "
                "the token ids belong to another model"
            )
        return ids

    def _loaded(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(str(self._root), trust_remote_code=False)
            except Exception as error:  # tokenizers raises nothing narrower for a damaged tokenizer.json
                why = (str(error).splitlines() or [type(error).__name__])[0]
                raise RecipeError(
                    f"{self._root}: has no tokenizer that can be loaded ({why}); calibrate on token ids instead (.npy, "
                    ".safetensors, .json)"
                ) from error
            if len(self._tokenizer) > self._rows:
                raise RecipeError(
                    f"{self._root}: the tokenizer has {len(self._tokenizer)} tokens, but the model's vocabulary "
                    f"{self._rows} rows; it belongs to another model"
                )
        return self._tokenizer

    def _chat_text(self, tokenizer: Any, messages: list[Any], where: str) -> str:
        from jinja2 import TemplateError

        if not tokenizer.chat_template:
            raise RecipeError(f"{where}: holds chats, but the tokenizer in {self._root} has no chat template")
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"{where}: the chat template refuses a chat: {error}") from error

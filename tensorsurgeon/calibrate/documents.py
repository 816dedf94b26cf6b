"""Read calibration sources: what kinds of file there are, and the documents each holds.

A document is a text, a chat (a list of messages) or token ids. Documents are read one by one, in the order asked for,
so that a large file costs no more than what is drawn from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from tensorsurgeon.errors import RecipeError

Document = str | list[Any] | np.ndarray

# A long text goes in blocks of about this many bytes, cut at line ends, so that sampling need not tokenize all of it.
_BLOCK_BYTES: Final = 1 << 20
_HUB_NAME: Final = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%-]+)?")
_DIGEST_BUFFER: Final = 1 << 20


@dataclass(frozen=True)
class Documents:
    """``count`` documents, read by number; ``digest`` names the content of the whole source."""

    kind: str
    count: int
    read: Callable[[int], Document]
    digest: str


def open_documents(location: str) -> Documents:
    """The documents of a file, by its suffix, or of a data set on the Hub; RecipeError says what is wrong with them."""
    path = Path(location)
    if not path.exists():
        if _HUB_NAME.fullmatch(location) and path.suffix not in _READERS:
            return _hub_dataset(location)
        raise RecipeError(f"{location}: no such file, and not the name of a Hub data set (owner/name)")
    if path.is_dir():
        raise RecipeError(f"{location}: is a folder; name the files in it")
    if not path.stat().st_size:
        raise RecipeError(f"{location}: is empty; calibration needs text")
    read = _READERS.get(path.suffix.lower(), _text)
    try:
        documents = read(path)
    except OSError as error:
        raise RecipeError(f"{location}: cannot be read: {error.strerror}") from error
    if not documents.count:
        raise RecipeError(f"{location}: holds no document; calibration needs text")
    return documents


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_DIGEST_BUFFER):
            digest.update(block)
    return f"xxh3_128:{digest.hexdigest()}"


def _text(path: Path) -> Documents:
    """One document, or blocks of a long one."""
    ranges = []
    start = 0
    size = path.stat().st_size
    with open(path, "rb") as file:
        while start < size:
            file.seek(min(start + _BLOCK_BYTES, size))
            file.readline()
            ranges.append((start, file.tell()))
            start = file.tell()
    return Documents("text", len(ranges), lambda n: _decoded(path, *ranges[n]), _digest(path))


def _decoded(path: Path, start: int, stop: int) -> str:
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {start + error.start}); convert it first") from error


def _json_lines(path: Path) -> Documents:
    ranges = []
    with open(path, "rb") as file:
        start = 0
        for line in file:
            if line.strip():
                ranges.append((start, start + len(line)))
            start += len(line)

    def read(number: int) -> Document:
        text = _decoded(path, *ranges[number])
        try:
            record = json.loads(text)
        except ValueError as error:
            raise RecipeError(f"{path}: the line at byte {ranges[number][0]} is not valid JSON: {error}") from error
        return _document(record, f"{path}: the line at byte {ranges[number][0]}")

    return Documents("json lines", len(ranges), read, _digest(path))


def _document(record: Any, where: str) -> Document:
    """The document in a record: its ``messages``, ``text`` or ``input_ids``; or a bare text."""
    if isinstance(record, str):
        return record
    if isinstance(record, Mapping):
        if isinstance(record.get("messages"), list):
            if not all(isinstance(message, Mapping) and "role" in message for message in record["messages"]):
                raise RecipeError(f"{where}: messages must be objects with role and content")
            return list(record["messages"])
        if isinstance(record.get("text"), str):
            return str(record["text"])
        if record.get("input_ids") is not None:
            return _ids(record["input_ids"], where)
        raise RecipeError(f"{where} has no text, messages or input_ids (found: {', '.join(map(str, record))})")
    raise RecipeError(f"{where} is {type(record).__name__}; an object with text, messages or input_ids is needed")


def _json(path: Path) -> Documents:
    try:
        content = json.loads(path.read_bytes())
    except (UnicodeDecodeError, ValueError) as error:
        raise RecipeError(f"{path}: is not valid JSON: {error}; JSON lines end in .jsonl") from error
    if not isinstance(content, list):
        raise RecipeError(f"{path}: must be a list of records or of token ids, found {type(content).__name__}")
    if content and all(isinstance(item, int) for item in content):
        content = [content]
    if content and isinstance(content[0], list):
        return Documents("token ids", len(content), lambda n: _ids(content[n], f"{path}[{n}]"), _digest(path))
    return Documents("json", len(content), lambda n: _document(content[n], f"{path}[{n}]"), _digest(path))


def _ids(content: Any, where: str) -> np.ndarray:
    try:
        ids = np.asarray(content)
    except ValueError as error:
        raise RecipeError(f"{where}: token ids must be whole numbers: {error}") from error
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise RecipeError(f"{where}: token ids must be whole numbers in one row, found {ids.dtype} {list(ids.shape)}")
    if ids.size and int(ids.min()) < 0:
        raise RecipeError(f"{where}: token id {int(ids.min())} is negative")
    return ids.astype(np.int64)


def _id_rows(path: Path, ids: np.ndarray) -> Documents:
    if ids.ndim not in (1, 2):
        raise RecipeError(f"{path}: token ids must have one or two axes, found {list(ids.shape)}")
    rows = ids.reshape(1, -1) if ids.ndim == 1 else ids
    return Documents("token ids", len(rows), lambda n: _ids(rows[n], f"{path}[{n}]"), _digest(path))


def _numpy(path: Path) -> Documents:
    try:
        return _id_rows(path, np.load(path, allow_pickle=False))
    except ValueError as error:
        raise RecipeError(f"{path}: is not a NumPy array of token ids: {error}") from error


def _safetensors(path: Path) -> Documents:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise RecipeError(f"{path}: is not a safetensors file: {error}") from error
    if "input_ids" not in tensors and len(tensors) != 1:
        raise RecipeError(f"{path}: must hold input_ids, found {', '.join(sorted(tensors)) or 'nothing'}")
    return _id_rows(path, tensors.get("input_ids", next(iter(tensors.values()))))


def _parquet(path: Path) -> Documents:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise RecipeError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    columns = [name for name in ("messages", "text", "input_ids") if name in parquet.read_schema(path).names]
    if not columns:
        raise RecipeError(f"{path}: has no column text, messages or input_ids")
    table = parquet.read_table(path, columns=columns[:1])

    def read(number: int) -> Document:
        return _document(table.slice(number, 1).to_pylist()[0], f"{path}: row {number}")

    return Documents("parquet", table.num_rows, read, _digest(path))


def _hub_dataset(name: str) -> Documents:
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(f"{name}: is no file here; to read it as a data set of the Hub, pip install datasets") from error
    repository, _, split = name.partition(":")
    try:
        found = datasets.load_dataset(repository, split=split or "train")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{name}: cannot be loaded from the Hub: {error}") from error
    # The fingerprint names the revision and everything done to the rows since.
    return Documents("hub", len(found), lambda n: _document(found[int(n)], f"{name}: row {n}"), f"datasets:{found._fingerprint}")


_READERS: Final[dict[str, Callable[[Path], Documents]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".npy": _numpy,
    ".parquet": _parquet,
    ".safetensors": _safetensors,
    ".txt": _text,
}

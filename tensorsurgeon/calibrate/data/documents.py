"""Read calibration sources: what kinds of file there are, and the documents each holds.

A document is a text, a chat (a list of messages) or token ids. Documents are read one by one, in the order asked for,
so that a large text or JSON lines file costs no more than what is drawn from it. Of a Parquet file the columns that hold
documents are in memory while it is drawn from: rows in random order would decode a row group each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from tensorsurgeon.errors import RecipeError

Document = str | list[Any] | np.ndarray

# A long text goes in blocks of about this many bytes, cut at line ends, so that sampling need not tokenize all of it.
_BLOCK_BYTES: Final = 1 << 20
# owner/name, owner/name:split, owner/name:config:split; a split may be cut (train[:10%]) or be several (train+test).
_HUB_NAME: Final = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+)(?=:))?(:(?P<split>[\w.+-]+(\[[\w:%-]*\])?))?"
)
# What a record may hold, the first that fits is taken.
_FIELDS: Final = ("messages", "text", "input_ids")
_DIGEST_BUFFER: Final = 1 << 20
BUILTIN: Final = "builtin"
"""The name of the text that comes with this package; what it is and under which licences says builtin.md beside it."""
_BUILTIN_FILE: Final = Path(__file__).with_name("builtin.jsonl")


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
    if location == BUILTIN and not path.exists():
        return replace(_json_lines(_BUILTIN_FILE), kind="builtin")
    if not path.exists():
        found = _HUB_NAME.fullmatch(location)
        if found and path.suffix.lower() not in _READERS:
            return _hub_dataset(location, found["repository"], found["config"], found["split"] or "train")
        raise RecipeError(f"{location}: no such file, and not the name of a Hub data set (owner/name)")
    if path.is_dir():
        raise RecipeError(f"{location}: is a folder; name the files in it")
    if not path.stat().st_size:
        raise RecipeError(f"{location}: is empty; calibration needs text")
    read = _READERS.get(path.suffix.lower(), _text)
    try:
        documents = read(path)
    except OSError as error:
        raise RecipeError(f"{location}: cannot be read: {error.strerror or _said(error)}") from error
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
    if not isinstance(record, Mapping):
        raise RecipeError(f"{where} is {type(record).__name__}; an object with text, messages or input_ids is needed")
    if isinstance(record.get("messages"), list):
        if not all(isinstance(message, Mapping) and "role" in message for message in record["messages"]):
            raise RecipeError(f"{where}: messages must be objects with role and content")
        return list(record["messages"])
    if isinstance(record.get("text"), str):
        return str(record["text"])
    if record.get("input_ids") is not None:
        return _ids(record["input_ids"], where)
    _check_fields(list(record), where)
    kinds = (f"{name} is {type(record[name]).__name__}" for name in _FIELDS if name in record)
    raise RecipeError(f"{where} holds no document: {', '.join(kinds).replace('NoneType', 'null')}; leave such records out")


def _check_fields(names: Iterable[str], where: str) -> None:
    """Raise RecipeError unless a record or a table has a field that holds documents."""
    names = [str(name) for name in names]
    if not set(names) & set(_FIELDS):
        raise RecipeError(f"{where} has no text, messages or input_ids (found: {', '.join(names) or 'nothing'})")


def _without_nulls(value: Any) -> Any:
    """A chat as it was before a table gave each message and each tool call every key of all the others, set to null.

    Templates ask whether a message has ``tool_calls``; that ``content`` is null is theirs to know.
    """
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _row(record: Mapping[str, Any], where: str) -> Document:
    """The document in a row of a table."""
    return _document({**record, "messages": _without_nulls(record["messages"])} if "messages" in record else record, where)


def _said(error: BaseException) -> str:
    """What an error and the one that caused it say, in one line."""
    told = dict.fromkeys(" ".join(str(e).split()) for e in (error, error.__cause__) if e is not None and str(e))
    return ": ".join(told) or type(error).__name__


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
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise RecipeError(f"{path}: reading Parquet needs pyarrow: pip install 'tensorsurgeon[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_fields(names, str(path))
            table = file.read(columns=[name for name in _FIELDS if name in names])
    except ArrowException as error:
        raise RecipeError(f"{path}: is not a Parquet file, or is damaged: {_said(error)}") from error

    def read(number: int) -> Document:
        try:
            row = table.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: row {number} is not UTF-8 text") from error
        return _row(row, f"{path}: row {number}")

    return Documents("parquet", table.num_rows, read, _digest(path))


def _hub_dataset(name: str, repository: str, config: str | None, split: str) -> Documents:
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(f"{name}: is no file here; to read it from the Hub, pip install 'tensorsurgeon[datasets]'") from error
    try:
        found = datasets.load_dataset(repository, config, split=split)
    except ConnectionError as error:
        why = "HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else _said(error)
        raise RecipeError(
            f"{name}: is no file here and not in the cache of data sets, and the Hub cannot be reached ({why}); load it once "
            "with a connection, or save it as .jsonl or .parquet and name the file"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise RecipeError(
            f"{name}: is no file here, and cannot be loaded from the Hub: {_said(error)}; OWNER/NAME:CONFIG:SPLIT names a part "
            "of a data set"
        ) from error
    _check_fields(found.column_names, name)
    # The fingerprint names the revision and everything done to the rows since.
    digest = f"datasets:{found._fingerprint}"
    # Other columns may hold images, which take another library to read.
    rows = found.select_columns([field for field in _FIELDS if field in found.column_names])
    return Documents("hub", len(rows), lambda n: _row(rows[int(n)], f"{name}: row {n}"), digest)


_READERS: Final[dict[str, Callable[[Path], Documents]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".npy": _numpy,
    ".parquet": _parquet,
    ".safetensors": _safetensors,
    ".txt": _text,
}

"""Read, check and build the header of one safetensors file.

The file is ``u64 length | JSON | data``. A header is input from a stranger: every size is bounded before it is
believed, and the data must be tiled by the tensors exactly, without gaps or overlaps, as the safetensors library
itself demands.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from tensorsurgeon.checkpoint.small_files import Stamp, is_lfs_pointer, open_regular, unreadable
from tensorsurgeon.errors import HeaderError
from tensorsurgeon.tensors.dtypes import DTYPES, DType
from tensorsurgeon.tensors.spec import TensorSpec

# The bound of the safetensors library; a larger header is refused by every reader.
MAX_HEADER_BYTES = 100_000_000
# The longest names in use have 200 letters in 15 parts. What a name and all that it begins with take, letters times parts,
# is bounded for the header as well: names of 60 letters in 8 parts have half of that in the largest header.
_MAX_NAME = 1 << 16
_MAX_NAME_PARTS = 200
_MAX_PATHS = 6 * MAX_HEADER_BYTES
_METADATA = "__metadata__"
_KEYS = {"dtype", "shape", "data_offsets"}
NO_STAMP = Stamp(0, 0, 0, 0)


class Entry(NamedTuple):
    """One tensor of a shard and its first byte, counted from the start of the file."""

    spec: TensorSpec
    offset: int


class ShardHeader(NamedTuple):
    """What one file holds, in the order of its bytes.

    Half a million tensors are not rare, so that there is one object for each, its spec, and numbers lie in arrays.
    """

    path: Path
    specs: tuple[TensorSpec, ...]
    # The first byte of each, counted from the start of the file.
    offsets: array[int]
    metadata: dict[str, str]
    file_bytes: int
    # The JSON as it lies in the file, so that a fingerprint can notice any change; a tenth of its size.
    compressed: bytes
    # Of the file when it was read; only headers made in memory have none.
    stamp: Stamp = Stamp(0, 0, 0, 0)

    @property
    def entries(self) -> Iterator[Entry]:
        """Each tensor with its place."""
        return map(Entry, self.specs, self.offsets)

    @property
    def raw(self) -> bytes:
        """The JSON as it lies in the file."""
        return zlib.decompress(self.compressed)


def read_header(path: Path) -> ShardHeader:
    """The checked header of ``path``; HeaderError says what is wrong with the file and what was expected."""
    try:
        fd = open_regular(path)
    except OSError as error:
        what = "not a regular file" if error.errno == errno.EINVAL else unreadable(error)
        raise HeaderError(what, where=str(path)) from error
    try:
        stamp = Stamp.of(os.fstat(fd))
        raw = _read_json_bytes(fd, stamp.nbytes, path)
    finally:
        os.close(fd)
    try:
        return parse_header(raw, stamp.nbytes, path)._replace(stamp=stamp)
    except HeaderError as error:
        raise HeaderError(error.message, where=str(path)) from error.__cause__


def _read_json_bytes(fd: int, file_bytes: int, path: Path) -> bytes:
    if file_bytes < 8:
        raise HeaderError(f"{file_bytes} bytes is too short for a safetensors file; download it again", where=str(path))
    head = os.pread(fd, 8, 0)
    if head == b"version " and is_lfs_pointer(os.pread(fd, 64, 0)):
        raise HeaderError("is a Git LFS pointer and not the file itself; run git lfs pull", where=str(path))
    length = header_bytes(head, file_bytes, str(path))
    chunks = []
    position = 8
    while position < 8 + length:
        chunk = os.pread(fd, 8 + length - position, position)
        if not chunk:
            raise HeaderError("the file became shorter while it was read", where=str(path))
        chunks.append(chunk)
        position += len(chunk)
    return b"".join(chunks)


def header_bytes(head: bytes, file_bytes: int, where: str) -> int:
    """How long the JSON of a header is, by the first eight bytes of its file; HeaderError for what no reader accepts."""
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"the header claims {length} bytes, more than the {MAX_HEADER_BYTES} that safetensors allows; "
            "this is no safetensors file, or a damaged one",
            where=where,
        )
    if 8 + length > file_bytes:
        raise HeaderError(
            f"the header claims {length} bytes but the file ends after {file_bytes}; it is truncated, download it again",
            where=where,
        )
    return length


def parse_header(raw: bytes, file_bytes: int, path: Path) -> ShardHeader:
    """Check the JSON of a header against the size of its file."""
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise HeaderError(f"the header is not valid UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise HeaderError(f"the header is not valid JSON: {error.msg} at byte {error.pos}") from error
    except RecursionError as error:
        raise HeaderError("the header's JSON is nested too deeply") from error
    except ValueError as error:
        # Python refuses to read numbers of more than some thousand digits.
        raise HeaderError("the header contains a number that is no size") from error
    if not isinstance(document, dict):
        raise HeaderError(f"the header must be a JSON object, found {type(document).__name__}")
    metadata = _parse_metadata(document.pop(_METADATA, None))
    data_start = 8 + len(raw)
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    found = [_parse_entry(name, value, shapes) for name, value in document.items()]
    _check_text(document, metadata)
    found.sort(key=lambda item: (item[1], item[2]))
    position = 0
    for spec, begin, end in found:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else f"leaves a gap of {begin - position} bytes"
            raise HeaderError(f"{spec.name}: starts at byte {begin}, expected {position}: it {kind}")
        position = end
    if data_start + position != file_bytes:
        fault = "it is truncated, download it again" if data_start + position > file_bytes else "it has bytes that no tensor owns"
        raise HeaderError(f"the tensors end at byte {data_start + position} but the file at {file_bytes}; {fault}")
    offsets = array("q", (data_start + begin for _, begin, _ in found))
    return ShardHeader(path, tuple(spec for spec, _, _ in found), offsets, metadata, file_bytes, zlib.compress(raw, 1))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise HeaderError(f"{key}: the name occurs twice in the header")
            seen.add(key)
    return result


def _no_constant(word: str) -> None:
    raise HeaderError(f"the header contains {word}, which is no JSON number")


def _check_text(names: Iterable[str], metadata: Mapping[str, str]) -> None:
    """Escapes such as ``\\ud800`` are half a character: no reader takes them, and no file can be written with them.

    A name of megabytes, or of thousands of parts, is no name: whoever keeps all that it may stand for runs out of memory.
    """
    paths = 0
    for name in names:
        parts = name.count(".") + 1
        paths += len(name) * parts
        if len(name) > _MAX_NAME or parts > _MAX_NAME_PARTS + 1 or paths > _MAX_PATHS:
            several = "" if len(name) > _MAX_NAME or parts > _MAX_NAME_PARTS + 1 else ", after many others like it"
            raise HeaderError(f"a name has {len(name)} letters in {parts} parts{several}, it begins {name[:40]!r}")
    try:
        "".join(names).encode()
        "".join(part for pair in metadata.items() for part in pair).encode()
    except UnicodeEncodeError as error:
        raise HeaderError(f"a name or __metadata__ contains half a character ({error.object[error.start]!r})") from error


def _parse_metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise HeaderError(f"{_METADATA} must map strings to strings")
    return value


def _is_size(value: Any) -> bool:
    # bool is an int in Python, and `"shape": [true]` must not pass for [1].
    return type(value) is int and 0 <= value < 1 << 63


def _parse_entry(name: str, value: Any, shapes: dict[tuple[int, ...], tuple[int, ...]]) -> tuple[TensorSpec, int, int]:
    if not isinstance(value, dict) or value.keys() != _KEYS:
        raise HeaderError(f"{name}: expected the keys dtype, shape and data_offsets, found {_shown(value)}")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise HeaderError(f"{name}: unknown dtype {_shown(value['dtype'])}; known: {', '.join(DTYPES)}")
    shape = value["shape"]
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise HeaderError(f"{name}: shape must be a list of sizes, found {_shown(shape)}")
    offsets = value["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise HeaderError(f"{name}: data_offsets must be two sizes, found {_shown(offsets)}")
    begin, end = offsets
    bits = _bits(name, shape, dtype)
    if bits % 8 or end - begin != bits // 8:
        raise HeaderError(
            f"{name}: {dtype.name}{_shown(shape)} takes {bits / 8:g} bytes but data_offsets {offsets} hold {end - begin}"
        )
    sizes = tuple(shape)
    return TensorSpec(name, dtype, shapes.setdefault(sizes, sizes)), begin, end


def _bits(name: str, shape: list[int], dtype: DType) -> int:
    """Bits of a tensor; multiplied axis by axis, for a product of many large sizes would take hours.

    The safetensors library counts in 64 bits and refuses what overflows on the way, even if a later axis is zero.
    """
    bits = dtype.bits
    for size in shape:
        bits *= size
        if bits >= 1 << 63:
            raise HeaderError(f"{name}: {dtype.name}{_shown(shape)} is larger than any file can be")
    return bits


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def build_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, list[int], int]:
    """The first bytes of a file that holds ``specs`` in this order, each tensor's offset in it, and its size.

    Padded with spaces so that data starts at a multiple of 8, as the safetensors library writes it.
    """
    parts = [f'"{_METADATA}":{json.dumps(dict(metadata), ensure_ascii=False)}'] if metadata else []
    position = 0
    begins = []
    quoted = json.encoder.encode_basestring
    # A model has few forms of tensors and many tensors.
    forms: dict[tuple[DType, tuple[int, ...]], tuple[str, int]] = {}
    for name, dtype, shape in specs:
        begins.append(position)
        form = forms.get((dtype, shape))
        if form is None:
            text = f'"dtype":"{dtype.name}","shape":[{",".join(map(str, shape))}]'
            form = forms[(dtype, shape)] = text, prod(shape) * dtype.bits // 8
        end = position + form[1]
        parts.append(f'{quoted(name)}:{{{form[0]},"data_offsets":[{position},{end}]}}')
        position = end
    try:
        raw = ("{" + ",".join(parts) + "}").encode()
    except UnicodeEncodeError as error:
        raise HeaderError(f"a tensor name contains half a character ({error.object[error.start]!r})") from error
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise HeaderError(f"a header of {len(raw)} bytes is more than readers accept", remedy="; use a smaller {max_shard_size}")
    data_start = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, [data_start + b for b in begins], data_start + position


def alignment_rank(dtype: DType) -> int:
    """Sort key that puts wide elements first, so that every tensor in a file is aligned to its element size.

    The safetensors library writes in this order too; torch cannot view a misaligned tensor.
    """
    return -dtype.bits

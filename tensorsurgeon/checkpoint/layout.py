"""Where each output tensor lies: shards, headers, offsets and the index, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tensorsurgeon.checkpoint.header import MAX_HEADER_BYTES, alignment_rank, build_header
from tensorsurgeon.errors import HeaderError
from tensorsurgeon.tensors.spec import TensorSpec

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
# What transformers and diffusers call the weights of a model.
STEMS = ("model", "diffusion_pytorch_model")
INDEX_NAME = f"{STEMS[0]}.safetensors.index.json"


class Placement(NamedTuple):
    """The place of one tensor: which shard, and its first byte in that file."""

    shard: int
    offset: int


class OutputShard(NamedTuple):
    """One file to be written: its final name, its first bytes, its size and its tensors in file order."""

    name: str
    header: bytes
    file_bytes: int
    specs: tuple[TensorSpec, ...]


class Layout(NamedTuple):
    """All output shards and the place of every tensor in them."""

    shards: tuple[OutputShard, ...]
    placements: dict[str, Placement]
    # None when there is a single shard, which needs no index.
    index_json: bytes | None
    total_bytes: int
    index_name: str = INDEX_NAME


def lay_out(specs: Sequence[TensorSpec], metadata: Mapping[str, str], max_shard_bytes: int, stem: str = STEMS[0]) -> Layout:
    """Cut tensors into shards of at most ``max_shard_bytes`` of data, in order, with the Hub's file names.

    Files are called ``stem``, one of ``STEMS``, for libraries find a model by the name of its files.

    A tensor larger than the limit gets a shard of its own; where a header would be larger than readers accept, there are more
    shards. Within a shard wide elements come first (see
    ``alignment_rank``), otherwise the order is kept.
    """
    try:
        return _placed(_cut(specs, max_shard_bytes, None), metadata, stem)
    except HeaderError:
        # Half a million small tensors fit a shard, and no reader takes their header.
        return _placed(_cut(specs, max_shard_bytes, MAX_HEADER_BYTES), metadata, stem)


def _cut(specs: Sequence[TensorSpec], max_shard_bytes: int, max_header_bytes: int | None) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    filled = header = 0
    for spec in specs:
        nbytes = spec.nbytes
        entry = 0 if max_header_bytes is None else _most_header_bytes(spec)
        if groups[-1] and (filled + nbytes > max_shard_bytes or (max_header_bytes and header + entry > max_header_bytes)):
            groups.append([])
            filled = header = 0
        groups[-1].append(spec)
        filled += nbytes
        header += entry
    return groups


def _most_header_bytes(spec: TensorSpec) -> int:
    """A header has no more for a tensor: its name, its sizes, two offsets, and the words between them."""
    return len(json.dumps(spec.name, ensure_ascii=False).encode()) + len(str(spec.shape)) + 110


def _placed(groups: list[list[TensorSpec]], metadata: Mapping[str, str], stem: str) -> Layout:
    names = [_shard_name(stem, number, len(groups)) for number in range(len(groups))]
    shards = []
    placements: dict[str, Placement] = {}
    total = 0
    for number, group in enumerate(groups):
        in_file = sorted(group, key=_alignment)
        header, offsets, file_bytes = build_header(in_file, metadata)
        total += file_bytes - len(header)
        for spec, offset in zip(in_file, offsets, strict=True):
            placements[spec[0]] = Placement(number, offset)
        shards.append(OutputShard(names[number], header, file_bytes, tuple(in_file)))
    index = _index(groups, names, total) if len(groups) > 1 else None
    return Layout(tuple(shards), placements, index, total, f"{stem}.safetensors.index.json")


def _alignment(spec: TensorSpec) -> int:
    return alignment_rank(spec.dtype)


def _index(groups: Sequence[Sequence[TensorSpec]], names: Sequence[str], total: int) -> bytes:
    """The index as the Hub's tools write it; by hand, for the indenting encoder of json is ten times slower."""
    quoted = json.encoder.encode_basestring
    rows = ",\n".join([f'    {quoted(spec[0])}: "{name}"' for group, name in zip(groups, names, strict=True) for spec in group])
    return f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{\n{rows}\n  }}\n}}\n'.encode()


def _shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"

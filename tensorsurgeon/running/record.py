"""``surgeon.json``: what made a checkpoint, and a digest of every byte range of its shards.

It holds no time and no machine, so that the same run writes the same record everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from tensorsurgeon.checkpoint.folder import RECORD_NAME
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.version import __version__

_ALGORITHM = "xxh3_64"


class Range(NamedTuple):
    """A range of bytes of one shard and its digest."""

    shard: str
    offset: int
    nbytes: int
    digest: str


def written_ranges(plan: Plan, digests: dict[int, list[str]]) -> list[Range]:
    """Every range that a run wrote, headers included, in file order."""
    names = [shard.name for shard in plan.layout.shards]
    ranges = [Range(shard.name, 0, len(shard.header), xxhash.xxh3_64_hexdigest(shard.header)) for shard in plan.layout.shards]
    for number, unit in enumerate(plan.units):
        places = [(w.shard, w.offset, w.nbytes) for w in unit.writes] + [(c.shard, c.offset, c.nbytes) for c in unit.copies]
        for (shard, offset, nbytes), digest in zip(places, digests[number], strict=True):
            ranges.append(Range(names[shard], offset, nbytes, digest))
    ranges.sort(key=lambda r: (r.shard, r.offset))
    return ranges


def record_bytes(plan: Plan, digests: dict[int, list[str]]) -> bytes:
    """The content of ``surgeon.json`` for a finished run."""
    shards: dict[str, list[list[Any]]] = {}
    for shard, offset, nbytes, digest in written_ranges(plan, digests):
        shards.setdefault(shard, []).append([offset, nbytes, digest])
    document = {
        "tensorsurgeon": __version__,
        "fingerprint": plan.fingerprint,
        "recipe": [f"{step!r}" for step in plan.steps],
        "source": {"tensors": len(plan.source.specs), "bytes": plan.source.weight_bytes},
        **({"calibration": plan.calibration} if plan.calibration else {}),
        "digest": _ALGORITHM,
        "shards": shards,
    }
    head = json.dumps({k: v for k, v in document.items() if k != "shards"}, indent=1)[:-2]
    rows = (f"  {json.dumps(name)}: {json.dumps(ranges, separators=(',', ':'))}" for name, ranges in shards.items())
    return (head + ',\n "shards": {\n' + ",\n".join(rows) + "\n }\n}\n").encode()


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a checkpoint; None if it has none, CheckpointError if it is damaged."""
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_bytes())
        if record["digest"] != _ALGORITHM:
            raise CheckpointError(f"digests are {record['digest']}, but this version knows {_ALGORITHM}", where=str(path))
        list(recorded_ranges(record))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"is damaged: {error!r}", where=str(path)) from error
    return dict(record)


def recorded_ranges(record: dict[str, Any]) -> Iterator[Range]:
    """The ranges of a record, in file order."""
    for shard, ranges in record["shards"].items():
        for offset, nbytes, digest in ranges:
            yield Range(str(shard), int(offset), int(nbytes), str(digest))

"""How two checkpoints differ: names, types, shapes, bytes, config keys and side files, whatever the sharding."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tensorsurgeon.checkpoint.folder import Checkpoint, open_checkpoint
from tensorsurgeon.checkpoint.tensor_reader import CHUNK_BYTES, TensorReader
from tensorsurgeon.machine.limits import usable_cores
from tensorsurgeon.machine.threads import in_threads
from tensorsurgeon.planning.report import document, group_specs, grouped_name, table
from tensorsurgeon.tensors.sizes import show_size
from tensorsurgeon.tensors.spec import TensorSpec

_MISSING = object()


class OtherSpec(NamedTuple):
    """One name, two tensors that cannot be compared by bytes."""

    a: TensorSpec
    b: TensorSpec


class OtherBytes(NamedTuple):
    """Tensors of one spec whose bytes differ: in how many elements, and which is the first (by flat index)."""

    spec: TensorSpec
    elements: int
    first: int


class OtherValue(NamedTuple):
    """A key of config.json; ``has_a`` and ``has_b`` tell an absent key from a null."""

    key: str
    a: Any
    b: Any
    has_a: bool
    has_b: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Everything in which B differs from A; ``compared_bytes`` is None where only headers were looked at."""

    only_a: tuple[TensorSpec, ...]
    only_b: tuple[TensorSpec, ...]
    other_spec: tuple[OtherSpec, ...]
    other_bytes: tuple[OtherBytes, ...]
    config: tuple[OtherValue, ...]
    files_only_a: tuple[str, ...]
    files_only_b: tuple[str, ...]
    other_files: tuple[str, ...]
    equal_tensors: int
    compared_bytes: int | None

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs at all."""
        return not (
            self.only_a or self.only_b or self.other_spec or self.other_bytes or self.config
            or self.files_only_a or self.files_only_b or self.other_files
        )  # fmt: skip


def diff_checkpoints(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    headers_only: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Difference:
    """Compare two checkpoints; bytes are streamed in pieces, so that memory does not depend on the tensors."""
    first, second = open_checkpoint(a, tolerant=True), open_checkpoint(b, tolerant=True)
    same = [spec for name, spec in first.specs.items() if second.specs.get(name) == spec]
    other_bytes: list[OtherBytes] = []
    if not headers_only:
        with TensorReader(first, progress=progress) as one, TensorReader(second, progress=progress) as two:
            ordered = sorted(same, key=lambda spec: one.location(spec.name))
            found = in_threads(lambda spec: _compare(one, two, spec), ordered, workers or usable_cores())
            other_bytes = [difference for difference in found if difference is not None]
    order = {name: number for number, name in enumerate(first.specs)}
    files_a, files_b = set(first.side_files), set(second.side_files)
    return Difference(
        only_a=tuple(spec for name, spec in first.specs.items() if name not in second.specs),
        only_b=tuple(spec for name, spec in second.specs.items() if name not in first.specs),
        other_spec=tuple(
            OtherSpec(spec, second.specs[name]) for name, spec in first.specs.items() if second.specs.get(name, spec) != spec
        ),
        other_bytes=tuple(sorted(other_bytes, key=lambda d: order[d.spec.name])),
        config=tuple(_other_values(first.config, second.config)),
        files_only_a=tuple(sorted(files_a - files_b)),
        files_only_b=tuple(sorted(files_b - files_a)),
        other_files=tuple(_other_files(first, second, sorted(files_a & files_b))),
        equal_tensors=len(same) - len(other_bytes),
        compared_bytes=None if headers_only else sum(spec.nbytes for spec in same),
    )


def bytes_to_compare(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> int:
    """How many bytes ``diff_checkpoints`` will read from both; for a progress bar."""
    first, second = open_checkpoint(a, tolerant=True), open_checkpoint(b, tolerant=True)
    return 2 * sum(spec.nbytes for name, spec in first.specs.items() if second.specs.get(name) == spec)


def _compare(one: TensorReader, two: TensorReader, spec: TensorSpec) -> OtherBytes | None:
    width = max(1, spec.dtype.bits // 8)
    elements, first = 0, -1
    for start in range(0, spec.nbytes, CHUNK_BYTES):
        count = min(CHUNK_BYTES, spec.nbytes - start)
        left, right = one.bytes_of(spec.name, start, count), two.bytes_of(spec.name, start, count)
        if np.array_equal(left, right):
            continue
        wrong = (left != right).reshape(-1, width).any(axis=1)
        if first < 0:
            first = start // width + int(np.flatnonzero(wrong)[0])
        elements += int(np.count_nonzero(wrong))
    return OtherBytes(spec, elements, first) if elements else None


def _other_values(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> Iterator[OtherValue]:
    """Keys that differ, each by its path; a mapping that only one side has is one key."""
    for key in [*a, *(k for k in b if k not in a)]:
        name = f"{path}.{key}" if path else key
        left, right = a.get(key, _MISSING), b.get(key, _MISSING)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            yield from _other_values(left, right, name)
        elif left != right or isinstance(left, bool) != isinstance(right, bool):
            yield OtherValue(
                name,
                None if left is _MISSING else left,
                None if right is _MISSING else right,
                left is not _MISSING,
                right is not _MISSING,
            )


def _other_files(first: Checkpoint, second: Checkpoint, names: list[str]) -> Iterator[str]:
    for name in names:
        if not filecmp.cmp(first.root / name, second.root / name, shallow=False):
            yield name


def difference_as_data(found: Difference) -> dict[str, Any]:
    """Every difference exactly, for ``--json``."""

    def spec(s: TensorSpec) -> dict[str, Any]:
        return {"name": s.name, "dtype": s.dtype.name, "shape": list(s.shape), "bytes": s.nbytes}

    return {
        "equal": found.is_equal,
        "only_a": [spec(s) for s in found.only_a],
        "only_b": [spec(s) for s in found.only_b],
        "other_spec": [{"name": d.a.name, "a": spec(d.a), "b": spec(d.b)} for d in found.other_spec],
        "other_bytes": [{**spec(d.spec), "elements": d.elements, "first": d.first} for d in found.other_bytes],
        "config": [{"key": d.key, **({"a": d.a} if d.has_a else {}), **({"b": d.b} if d.has_b else {})} for d in found.config],
        "files_only_a": list(found.files_only_a),
        "files_only_b": list(found.files_only_b),
        "other_files": list(found.other_files),
        "equal_tensors": found.equal_tensors,
        "compared_bytes": found.compared_bytes,
    }


def difference_as_text(found: Difference) -> str:
    """The differences by pattern, for a reader; ``-`` is only in A, ``+`` only in B, ``~`` in both and different."""
    compared = "headers only" if found.compared_bytes is None else f"{show_size(found.compared_bytes)} compared"
    lines = [f"{'equal' if found.is_equal else 'different'}: {found.equal_tensors} tensors are the same ({compared})"]
    for sign, specs in (("-", found.only_a), ("+", found.only_b)):
        rows = [
            [f"{sign} {g['pattern']}", f"x {g['count']}", g["dtype"], str(g["shape"]), show_size(g["bytes"])]
            for g in group_specs(specs)
        ]
        lines += [table(rows, right={1, 4})] if rows else []
    changed: dict[tuple[str, str], int] = {}
    for pair in found.other_spec:
        text = f"{pair.a.dtype.name}{list(pair.a.shape)} -> {pair.b.dtype.name}{list(pair.b.shape)}"
        changed[grouped_name(pair.a.name), text] = changed.get((grouped_name(pair.a.name), text), 0) + 1
    lines += [table([[f"~ {name}", f"x {count}", text] for (name, text), count in changed.items()], right={1})] if changed else []
    lines += _bytes_as_text(found)
    for value in found.config:
        left, right = _shown(value.a) if value.has_a else "absent", _shown(value.b) if value.has_b else "absent"
        lines.append(f"~ config.json {value.key}: {left} -> {right}")
    for sign, names in (("-", found.files_only_a), ("+", found.files_only_b), ("~", found.other_files)):
        lines += [f"{sign} file {name}" for name in names]
    return document(lines)


def _bytes_as_text(found: Difference) -> list[str]:
    groups: dict[str, list[OtherBytes]] = {}
    for difference in found.other_bytes:
        groups.setdefault(grouped_name(difference.spec.name), []).append(difference)
    rows = []
    for pattern, members in groups.items():
        elements, total = sum(d.elements for d in members), sum(d.spec.numel for d in members)
        rows.append(
            [
                f"~ {pattern}",
                f"x {len(members)}",
                f"other bytes in {elements} of {total} elements, first in {members[0].spec.name} at {members[0].first}",
            ]
        )
    return [table(rows, right={1})] if rows else []


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""Carry out a pairing: stream both checkpoints and say where they differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import xxhash

from tensorsurgeon.checkpoint.tensor_reader import CHUNK_BYTES, TensorReader
from tensorsurgeon.machine.threads import in_threads
from tensorsurgeon.tensors.spec import TensorSpec
from tensorsurgeon.verifying import fidelity
from tensorsurgeon.verifying.against import Pair, Part, SameBytes, SameWeight
from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.described import Module
from tensorsurgeon.verifying.fidelity import Fidelity
from tensorsurgeon.verifying.findings import Findings
from tensorsurgeon.verifying.layouts import stored_weight
from tensorsurgeon.verifying.made import MadeTensor
from tensorsurgeon.verifying.mistaken import other_readings
from tensorsurgeon.verifying.weights import FloatWeight, Weight


def compare_pairs(
    source: TensorReader, target: TensorReader, pairs: Iterable[Pair], findings: Findings, workers: int
) -> tuple[list[Fidelity], int]:
    """Every pair compared: the fidelity of stored weights, and the bytes that were found equal."""

    def compare(pair: Pair) -> Fidelity | int:
        if isinstance(pair, SameBytes):
            return _same_bytes(source, target, pair, findings)
        return _same_weight(source, target, pair, findings)

    # In the order of the source's bytes, so that disks read forwards.
    ordered = sorted(pairs, key=lambda pair: _place(source, pair))
    results = list(in_threads(compare, ordered, workers))
    return [r for r in results if isinstance(r, Fidelity)], sum(r for r in results if isinstance(r, int))


def _place(source: TensorReader, pair: Pair) -> tuple[int, int]:
    name = next(iter(pair.source.tensors.values())).name if isinstance(pair.source, Module) else pair.source.name
    return source.location(name) if name else (0, 0)


def _range(reader: TensorReader, part: Part) -> tuple[int, int]:
    """First byte and bytes of a part; a part of -1 rows is the whole tensor."""
    spec = reader.specs[part.name]
    return (0, spec.nbytes) if part.rows < 0 else (part.first * spec.row_bytes, part.rows * spec.row_bytes)


def _same_bytes(source: TensorReader, target: TensorReader, pair: SameBytes, findings: Findings) -> int:
    second, nbytes = _range(target, pair.target)
    first = 0 if isinstance(pair.source, MadeTensor) else _range(source, pair.source)[0]
    for start in range(0, nbytes, CHUNK_BYTES):
        count = min(CHUNK_BYTES, nbytes - start)
        if isinstance(pair.source, MadeTensor):
            one = pair.source.bytes_of(start, count)
        else:
            one = source.bytes_of(pair.source.name, first + start, count)
        other = target.bytes_of(pair.target.name, second + start, count)
        if not np.array_equal(one, other):
            spec = target.specs[pair.target.name]
            at = start + int(np.flatnonzero(one != other)[0])
            element = (second + at) * 8 // spec.dtype.bits
            position = [int(i) for i in np.unravel_index(element, spec.shape)] if spec.shape else []
            findings.fault(
                "bytes", pair.target.name,
                f"differs from the source{_origin(pair)} from element {position} on; it should pass through byte for byte",
            )  # fmt: skip
            return 0
    return nbytes


def _origin(pair: SameBytes) -> str:
    if pair.source.name == pair.target.name:
        return ""
    row = "" if isinstance(pair.source, MadeTensor) else f", row {pair.source.first} on"
    return f" ({pair.source.name}{row})"


def _same_weight(source: TensorReader, target: TensorReader, pair: SameWeight, findings: Findings) -> Fidelity:
    claim = pair.target.claim if isinstance(pair.target, Module) else None
    original = _weight(source, pair.source, pair.shape)
    result = fidelity.compare(pair.name, original, _weight(target, pair.target, pair.shape), claim)
    if not result.is_sound:
        better = other_readings(target, pair.target, original) if isinstance(pair.target, Module) else ""
        findings.fault("fidelity", pair.name, _complaint(result, claim) + better)
    return result


def _complaint(result: Fidelity, claim: Claim | None) -> str:
    stored = "a cast of the source" if claim is None else claim.describe()
    if result.not_finite:
        return f"reads as NaN or infinity in {_rows(result.not_finite)}, row {result.first_bad_row} first"
    if result.is_shifted and not result.bad_rows:
        return (
            f"is {abs(result.shift):.1f} steps too {'high' if result.shift > 0 else 'low'} on average ({result.snr_db:.1f} dB), "
            "and errors of rounding cancel out: the zero points are read wrongly"
        )
    if result.snr_db < result.floor_db:
        return (
            f"has {result.snr_db:.1f} dB against the source, where {stored} gives more than "
            f"{result.floor_db:g} dB: these are other weights, or they are read wrongly"
        )
    if result.complaint and not result.bad_rows:
        return f"{result.complaint} ({result.snr_db:.1f} dB over all rows)"
    return (
        f"{_rows(result.bad_rows)}, row {result.first_bad_row} first, with an error larger than the weights themselves, which "
        f"rounding never makes ({result.snr_db:.1f} dB over all rows)"
    )


def _rows(count: int) -> str:
    return f"{count} row{'s' if count > 1 else ''}"


def _weight(reader: TensorReader, side: Part | Module | MadeTensor, shape: tuple[int, int]) -> Weight:
    if isinstance(side, MadeTensor):
        return side
    if isinstance(side, Module):
        return stored_weight(reader, side.name, side.claim, side.shape)
    return FloatWeight(reader, side.name, shape, side.first)


def pair_by_content(
    source: TensorReader, target: TensorReader, lost: list[TensorSpec], new: list[TensorSpec], findings: Findings
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Renamed tensors, found by their bytes among what names left unexplained; what then remains of both."""
    sizes = {spec.nbytes for spec in lost} & {spec.nbytes for spec in new}
    by_digest: dict[tuple[str, int, str], list[TensorSpec]] = defaultdict(list)
    for spec in new:
        if spec.nbytes in sizes and spec.nbytes:
            by_digest[spec.dtype.name, spec.nbytes, _digest(target, spec)].append(spec)
    still_lost, explained = [], set()
    for spec in lost:
        found = (
            by_digest.get((spec.dtype.name, spec.nbytes, _digest(source, spec))) if spec.nbytes in sizes and spec.nbytes else None
        )
        if found:
            # Each new tensor stands for one that is lost, and for no other.
            other = found.pop(0)
            explained.add(other.name)
            findings.note("renamed", spec.name, f"is {other.name} here, byte for byte")
        else:
            still_lost.append(spec)
    return still_lost, [spec for spec in new if spec.name not in explained]


def _digest(reader: TensorReader, spec: TensorSpec) -> str:
    digest = xxhash.xxh3_128()
    for start in range(0, spec.nbytes, CHUNK_BYTES):
        digest.update(reader.bytes_of(spec.name, start, min(CHUNK_BYTES, spec.nbytes - start)).data)
    return digest.hexdigest()

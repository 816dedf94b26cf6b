"""A verification for readers and for scripts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final

from tensorsurgeon.planning.report import document, grouped_name, table
from tensorsurgeon.tensors.sizes import show_size
from tensorsurgeon.verifying.fidelity import Fidelity
from tensorsurgeon.verifying.findings import Fault, Note
from tensorsurgeon.verifying.judging import Verification

_WORST: Final = 10
_SHOWN_GROUPS: Final = 30


def verification_as_data(found: Verification) -> dict[str, Any]:
    """Everything, as plain data; an SNR that is no number of decibels is null, with ``exact`` telling why."""
    return {
        "path": str(found.path),
        "sound": found.is_sound,
        "faults": [_finding(f) for f in found.faults],
        "notes": [_finding(n) for n in found.notes],
        "tensors": found.tensors,
        "bytes": found.nbytes,
        "quantization": found.quantization,
        "quantized_modules": found.schemes,
        "digested_bytes": found.digested_bytes,
        "against": None if found.source is None else str(found.source),
        "equal_bytes": found.equal_bytes,
        "kinds": [
            {"pattern": kind, "count": len(members), "min_db": _number(low), "mean_db": _number(mean), "exact": exact}
            for kind, members, low, mean, exact in _kinds(found.compared)
        ],
        "weights": [_weight(f) for f in found.compared],
        "worst": [_weight(f) for f in worst(found.compared)],
    }


def _finding(found: Fault | Note) -> dict[str, str]:
    return {"kind": found.kind, "where": found.where, "message": found.message}


def _weight(found: Fidelity) -> dict[str, Any]:
    return {
        "name": found.name, "num_bits": found.num_bits, "snr_db": _number(found.snr_db), "exact": found.snr_db == math.inf,
        "floor_db": found.floor_db, "bad_rows": found.bad_rows, "rows_not_finite": found.not_finite,
        "shift": found.shift, "odd_cells": found.odd_cells,
    }  # fmt: skip


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def worst(compared: Iterable[Fidelity]) -> list[Fidelity]:
    """The ten weights that are furthest from their source."""
    return sorted((f for f in compared if f.snr_db != math.inf), key=lambda f: (f.snr_db, f.name))[:_WORST]


def _kinds(compared: Iterable[Fidelity]) -> list[tuple[str, list[Fidelity], float, float, int]]:
    """Weights that differ only in their numbers: pattern, members, least and mean SNR of those with an error, exact ones."""
    groups: dict[str, list[Fidelity]] = defaultdict(list)
    for found in compared:
        groups[grouped_name(found.name)].append(found)
    rows = []
    for kind, members in groups.items():
        inexact = [f.snr_db for f in members if f.snr_db != math.inf]
        low = min(inexact, default=math.inf)
        mean = sum(inexact) / len(inexact) if inexact else math.inf
        rows.append((kind, members, low, mean, len(members) - len(inexact)))
    return rows


def verification_as_text(found: Verification) -> str:
    """The verdict in the first line, then faults by kind, then what was compared."""
    count = len(found.faults)
    lines = ["sound" if found.is_sound else f"{count} fault{'s' if count > 1 else ''}"]
    lines += _findings_as_text(found.faults)
    lines += [""] if found.faults else []
    lines.append(f"checkpoint  {found.path}: {found.tensors} tensors, {show_size(found.nbytes)}")
    if found.quantization is not None:
        lines.append(f"config      {found.quantization}")
    lines += [f"quantized   x {count}  {scheme}" for scheme, count in found.schemes.items()]
    if found.digested_bytes is not None and not any(f.kind in ("digest", "record") for f in found.faults):
        lines.append(f"digests     {show_size(found.digested_bytes)} match surgeon.json")
    if found.source is not None:
        lines.append(
            f"source      {found.source}: {show_size(found.equal_bytes)} equal byte for byte, "
            f"{len(found.compared)} weights stored in another way"
        )
    if found.compared:
        rows = [["kind", "count", "min dB", "mean dB"]]
        rows += [[kind, f"x {len(m)}", _decibels(low), _decibels(mean)] for kind, m, low, mean, _ in _kinds(found.compared)]
        lines += ["", table(rows, right={1, 2, 3})]
        furthest = worst(found.compared)
        if furthest and len(found.compared) > _WORST:
            lines += ["", f"worst {len(furthest)}:", table([["  " + f.name, _decibels(f.snr_db)] for f in furthest], right={1})]
    if found.notes:
        lines += ["", *_findings_as_text(found.notes, "note   ")]
    return document(lines)


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"


def _tensor(where: str) -> str:
    """The name without the position in it."""
    return where.partition("[")[0]


def _findings_as_text(findings: Iterable[Fault | Note], label: str = "fault  ") -> list[str]:
    """One line for all findings that differ only in their numbers: a broken expert is rarely alone."""
    groups: dict[tuple[str, str], list[Fault | Note]] = defaultdict(list)
    for finding in findings:
        # Entries of one config list are told apart by what they say.
        key = finding.message if finding.where.startswith("config.json") else grouped_name(_tensor(finding.where))
        groups[finding.kind, key].append(finding)
    lines = []
    for members in list(groups.values())[:_SHOWN_GROUPS]:
        more = f" (and {len(members) - 1} more such: {grouped_name(_tensor(members[0].where))})" if len(members) > 1 else ""
        lines.append(f"{label}{members[0]}{more}")
    if len(groups) > _SHOWN_GROUPS:
        lines.append(f"{label}and {len(groups) - _SHOWN_GROUPS} more kinds; the JSON has all")
    return lines

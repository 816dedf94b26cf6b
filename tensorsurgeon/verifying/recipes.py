"""The recipe that ``surgeon.json`` records, read as what it is: text that anybody may have written.

Each step is the repr of an op, ``Rename(where=('a',), to='b', exclude=())``. It is parsed and never evaluated, bounded
before it is believed, and made into ops by the same strict reader that reads transforms.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from tensorsurgeon.checkpoint.folder import RECORD_NAME, Checkpoint
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.ops.registry import OPS
from tensorsurgeon.planning.resolving import resolve
from tensorsurgeon.planning.rewriting import Transform
from tensorsurgeon.recipes.recipe import make_op
from tensorsurgeon.verifying.findings import Findings
from tensorsurgeon.verifying.lineage import Replay

# A step is recorded under its class: ``SplitExperts``.
_OPS_BY_CLASS: Final = {target.rpartition(":")[2]: name for name, target in OPS.items()}
_MOST_STEPS: Final = 1000
_MOST_LETTERS: Final = 1 << 16
_MOST_STARS: Final = 4
# A repeated group may try every way to cut a name; ``re`` can be stopped by nothing.
_RUNS_AWAY: Final = re.compile(r"\)[*+{]|\\[1-9]|\(\?P=")


class Call(NamedTuple):
    """One step as it is written: the op's class and its fields."""

    name: str
    fields: dict[str, Any]


def recorded_calls(record: Mapping[str, Any], findings: Findings) -> list[Call] | None:
    """The steps of the record; None, and a fault, if they are not what this program writes."""
    recipe = record.get("recipe")
    if not isinstance(recipe, list) or len(recipe) > _MOST_STEPS or not all(isinstance(step, str) for step in recipe):
        _fault(findings, "recipe is no list of steps")
        return None
    calls = []
    for number, text in enumerate(recipe, 1):
        call = _parsed(text)
        if call is None:
            _fault(findings, f"step {number} of the recipe is none: {text[:60]!a}")
            return None
        wild = next((p for p in _patterns(call.fields) if not _is_tame(p)), None)
        if wild is not None:
            _fault(findings, f"step {number} of the recipe has a pattern that could take forever: {wild[:60]!a}")
            return None
        calls.append(call)
    return calls


def replayed(calls: list[Call], record: Mapping[str, Any], source: Checkpoint, findings: Findings) -> Replay | None:
    """What the recorded recipe makes of the source, from headers alone; None, and a finding, where that cannot be said."""
    said = record.get("source")
    found = {"tensors": len(source.specs), "bytes": source.weight_bytes}
    if isinstance(said, Mapping) and any(said.get(key) != value for key, value in found.items() if key in said):
        findings.note(
            "other-source", RECORD_NAME,
            f"says that this was made from {said.get('tensors')!r:.20} tensors of {said.get('bytes')!r:.20} bytes; the source "
            f"given has {found['tensors']} of {found['bytes']}, and is compared by names and contents",
        )  # fmt: skip
        return None
    steps: list[Transform] = []
    for call in calls:
        op = _OPS_BY_CLASS.get(call.name)
        if op is None:
            findings.note(
                "unknown-op", RECORD_NAME, f"the recipe has a step {call.name[:60]}, which is none of this program's ops"
            )
            return None
        try:
            steps.append(make_op(op, call.fields))
        except (SurgeonError, ValueError, TypeError) as error:
            _fault(findings, f"a step {call.name} cannot be: {str(error)[:200]!a}")
            return None
    try:
        return Replay(steps, resolve(steps, source.specs))
    except SurgeonError as error:
        _fault(findings, f"the recipe does not fit this source: {error.message[:300]}")
        return None


def _fault(findings: Findings, message: str) -> None:
    findings.fault("recipe", RECORD_NAME, message)


def _parsed(text: str) -> Call | None:
    if len(text) > _MOST_LETTERS:
        return None
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            return None
        fields = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return Call(call.func.id, fields) if len(fields) == len(call.keywords) else None


def _patterns(fields: Mapping[str, Any]) -> Iterator[str]:
    for value in fields.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, str):
                yield item


def _is_tame(pattern: str) -> bool:
    """Whether matching is sure to end soon: few things that may take any number of letters, and none repeated."""
    body = pattern.removeprefix("maybe:")
    if not body.startswith("re:"):
        return body.count("*}") <= _MOST_STARS and body.count("{") <= 4 * _MOST_STARS
    return _RUNS_AWAY.search(body) is None and len(re.findall(r"[*+]|\{\d*,", body)) <= _MOST_STARS

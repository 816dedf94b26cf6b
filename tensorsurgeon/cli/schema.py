"""The shape of what ``--json`` prints, command by command, in JSON Schema: what is promised to scripts, and no more.

Keys that are not named here may come and go; those that are named stay, with their types. ``surgeon schema`` prints it.
"""

from __future__ import annotations

from typing import Any, Final

from tensorsurgeon.version import __version__

Schema = dict[str, Any]
_TEXT: Final[Schema] = {"type": "string"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_NUMBER: Final[Schema] = {"type": "number"}
_NUMBER_OR_NULL: Final[Schema] = {"type": ["number", "null"]}
_TEXT_OR_NULL: Final[Schema] = {"type": ["string", "null"]}
_YES_OR_NO: Final[Schema] = {"type": "boolean"}
_COUNTS: Final[Schema] = {"type": "object", "additionalProperties": _COUNT}


def _object(**keys: Schema) -> Schema:
    return {"type": "object", "properties": keys, "required": list(keys)}


def _with_some(schema: Schema, **keys: Schema) -> Schema:
    """The same with keys that are not always there."""
    return {**schema, "properties": {**schema["properties"], **keys}}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_FINDING: Final = _object(kind=_TEXT, where=_TEXT, message=_TEXT)
_LIKELIHOOD: Final = {"path": _TEXT, "name": _TEXT, "nll": _NUMBER, "nll_se": _NUMBER_OR_NULL, "perplexity": _NUMBER}
_ADVICE: Final = _object(
    severity={"enum": ["loads", "warns", "refuses", "silent-garbage"]}, tp=_COUNT, subject=_TEXT, reason=_TEXT
)
_ENGINE: Final = _object(engine=_TEXT, version=_TEXT, asked_tp=_list(_COUNT), loads_at_tp=_list(_COUNT), advice=_list(_ADVICE))
_TENSORS: Final = _object(pattern=_TEXT, count=_COUNT, dtype=_TEXT, shape=_list(_COUNT), bytes=_COUNT)
_SHARD: Final = _object(name=_TEXT, bytes=_COUNT, tensors=_COUNT)
_COMPARED: Final = {
    "kl": _NUMBER, "kl_se": _NUMBER_OR_NULL, "reverse_kl": _NUMBER, "top1_agreement": _NUMBER, "hidden_error": _list(_NUMBER),
}  # fmt: skip

_APPLIED: Final = _with_some(_object(
    target=_TEXT, tensors=_COUNT, bytes=_COUNT, source_bytes=_COUNT, shards=_COUNT, quantized_linears=_COUNT, methods=_COUNTS,
    seconds=_NUMBER, units=_COUNT, resumed_units=_COUNT,
), calibration={"type": "object"})  # fmt: skip
# Of a source on the Hub: what is fetched, and the most that lies beside the output at once.
_STREAMING: Final = _object(
    shards=_COUNT, fetched_bytes=_COUNT, spool_bytes=_COUNT, ahead=_COUNT, twice=_list(_TEXT), kept=_YES_OR_NO
)
# A dry run of calibration.
_REHEARSED: Final = _object(
    model=_TEXT, layers=_COUNT, sequences=_COUNT, sequence_length=_COUNT, tokens=_COUNT, memory_bytes=_COUNT,
    scratch_bytes=_COUNT, seconds=_object(per_layer={"type": "object", "additionalProperties": _NUMBER}, all=_NUMBER),
)  # fmt: skip

SCHEMAS: Final[dict[str, Schema]] = {
    "inspect": _object(
        path=_TEXT, tensors=_COUNT, bytes=_COUNT, shards=_list(_SHARD), has_index=_YES_OR_NO, groups=_list(_TENSORS),
        quantization={"type": ["object", "null"]}, side_files=_list(_TEXT), left_behind=_list(_TEXT), oddities=_list(_TEXT),
    ),
    "plan": _with_some(_object(
        source=_object(path=_TEXT, tensors=_COUNT, bytes=_COUNT),
        output=_object(tensors=_COUNT, bytes=_COUNT, shards=_list(_SHARD)),
        quantized_linears=_COUNT, linears=_COUNT, methods=_COUNTS, quantized=_COUNTS, unquantized=_COUNTS,
        why_unquantized={"type": "object", "additionalProperties": _TEXT}, disk_bytes=_COUNT, peak_unit_bytes=_COUNT,
        free_bytes=_COUNT, tensors=_list(_TENSORS), engines=_list(_ENGINE), one_way_steps=_list(_TEXT),
        streaming={"anyOf": [{"type": "null"}, _STREAMING]},
    ), calibration=_REHEARSED),
    "apply": _APPLIED,
    "resume": {"anyOf": [_object(target=_TEXT, was_complete=_YES_OR_NO), _APPLIED]},
    "push": _object(address=_TEXT, repository=_TEXT, commit=_TEXT, files=_COUNT, private=_YES_OR_NO),
    "verify": _object(
        path=_TEXT, sound=_YES_OR_NO, faults=_list(_FINDING), notes=_list(_FINDING), tensors=_COUNT, bytes=_COUNT,
        against=_TEXT_OR_NULL,
        weights=_list(_object(name=_TEXT, snr_db=_NUMBER_OR_NULL, exact=_YES_OR_NO)),
    ),
    "diff": {"type": "object"},
    "evaluate": _object(
        text=_object(sequences=_COUNT, tokens=_COUNT), device=_TEXT,
        source={"anyOf": [{"type": "null"}, _object(**_LIKELIHOOD)]},
        targets=_list({**_object(**_LIKELIHOOD), "properties": {**_LIKELIHOOD, **_COMPARED}}), notes=_list(_TEXT),
    ),
    "card": _object(card=_TEXT, missing=_list(_TEXT)),
    "page": _object(page=_TEXT),
    "transforms": {"anyOf": [
        _list(_object(name=_TEXT, description=_TEXT)),
        _object(name=_TEXT, description=_TEXT, parameters=_list(_object(name=_TEXT, default={}, description=_TEXT_OR_NULL))),
    ]},
}  # fmt: skip


def whole_schema() -> Schema:
    """All of them in one document, by command."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"what surgeon {__version__} prints with --json",
        "$defs": SCHEMAS,
    }

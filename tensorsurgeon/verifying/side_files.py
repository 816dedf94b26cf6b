"""Config, tokenizer, chat template and their kind: are they as they were written, and as the source has them?

A model answers by them as much as by its weights. ``surgeon.json`` knows their digests; a source says what they were,
by rule: the quantization may differ, and the dtype, and what tools note down about themselves.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.layout import INDEX_NAME
from tensorsurgeon.running.record import digest_of_file, recorded_files
from tensorsurgeon.tensors.spec import SpecMap
from tensorsurgeon.verifying.findings import Findings

CONFIG_NAME: Final = "config.json"
# Repeat the quantization, which may differ from the source's; ``described`` compares them with config.json.
QUANTIZATION_FILES: Final = ("quantize_config.json", "quantization_config.json", "quant_config.json", "hf_quant_config.json")
# For people, not for loaders.
_FOR_PEOPLE: Final = re.compile(
    r"(readme|license|licence|notice|use_policy|usage_policy|copyright|changelog)[^/]*|\.gitattributes|quant_log\.csv"
    r"|(evaluation|verification|surgeon_plan)\.json"
    r"|.*\.(html|md|png|jpe?g|gif|svg|webp|pdf|csv|log|ipynb|mp4)",
    re.IGNORECASE,
)
_FOR_LOADERS: Final = re.compile(
    r"(.*[_/])?(config|tokenizer|tokenization|vocab|merges|spiece|special_tokens|added_tokens|chat_template|preprocessor|processor"
    r"|template|modules)[^/]*|.*\.(py|jinja|model|tiktoken)"
)
_TOKENIZER: Final = re.compile(r"(tokeniz|vocab|merges|spiece|special_tokens|added_tokens)[^/]*|[^/]*\.(model|tiktoken)")
# What tools write about themselves, and how a cache is used: no weight and no answer depends on it.
_NEUTRAL: Final = frozenset({
    "transformers_version", "_name_or_path", "_from_model_config", "use_cache", "output_attentions", "output_hidden_states",
    "pad_token_id", "_commit_hash", "auto_map_cache",
})  # fmt: skip
_QUANTIZATION_KEYS: Final = frozenset({"quantization_config", "compression_config"})
_DTYPE_KEYS: Final = frozenset({"dtype", "torch_dtype"})
_DTYPES: Final = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "half": "F16", "float": "F32"}
# Keys that change what a model computes even where the source relies on their default.
_DECIDES: Final = re.compile(r"rope|scaling|sliding|softcap|tie_word|multiplier|_eps$|hidden_act|attention_type")
_ABSENT: Final = object()
# Larger JSON is compared as bytes. The largest tokenizers have 35 MB.
_MOST_JSON_BYTES: Final = 64 << 20


class Difference(NamedTuple):
    """A key at which two JSON objects differ; ``_ABSENT`` where one has none."""

    path: str
    before: Any
    after: Any


def check_recorded_files(checkpoint: Checkpoint, record: Mapping[str, Any], findings: Findings) -> None:
    """Compare config, index and side files with the digests of ``surgeon.json``; older records have none."""
    if "files" not in record or checkpoint.is_single_file:
        return
    known: set[str] = set()
    for name, nbytes, digest in recorded_files(dict(record)):
        known.add(name)
        path = checkpoint.root / name
        if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
            findings.fault("record", "surgeon.json", f"names {_shown(name)}, which does not lie beside it")
        elif not path.is_file():
            findings.fault("file-missing", name, "is not here, though the run wrote it; copy it from the source again")
        elif path.stat().st_size != nbytes or digest_of_file(path)[1] != digest:
            _changed(name, "is not what the run wrote", findings)
    present = {*checkpoint.side_files, *([CONFIG_NAME] if checkpoint.config_text is not None else [])}
    if checkpoint.has_index:
        present.add(INDEX_NAME)
    for name in sorted(present - known):
        if _FOR_LOADERS.fullmatch(name):
            findings.fault("file-added", name, "was added after the run, and loaders read files of this name")
        elif not _FOR_PEOPLE.fullmatch(name):
            findings.note("file-added", name, "was added after the run")


def _changed(name: str, message: str, findings: Findings) -> None:
    if _FOR_PEOPLE.fullmatch(name):
        findings.note("file-changed", name, message)
    else:
        findings.fault("file-changed", name, message)


def check_readable(checkpoint: Checkpoint, findings: Findings) -> None:
    """Every JSON file that loaders read is JSON."""
    for name in checkpoint.side_files:
        if name.endswith(".json") and _FOR_LOADERS.fullmatch(name) and name not in QUANTIZATION_FILES:
            path = checkpoint.root / name
            if 0 < path.stat().st_size <= _MOST_JSON_BYTES and _json_of(path) is _ABSENT:
                findings.fault("side-file", name, "is not valid JSON")


def check_files_against(source: Checkpoint, target: Checkpoint, findings: Findings) -> None:
    """Compare config.json and side files with the source's, by rule."""
    if source.config_text is not None and target.config_text is not None:
        _check_config(source.config, target.config, target.specs, findings)
    if source.is_single_file or target.is_single_file:
        return
    here = set(target.side_files)
    has_tokenizer = any(_TOKENIZER.fullmatch(name) for name in here)
    for name in source.side_files:
        if name in QUANTIZATION_FILES or _FOR_PEOPLE.fullmatch(name):
            continue
        if name in here:
            _compare_file(name, source.root / name, target.root / name, findings)
        elif _TOKENIZER.fullmatch(name) and not has_tokenizer:
            # Many tools save the model alone, and leave the tokenizer to whoever publishes it.
            findings.note("no-tokenizer", name, "lies beside the source, and no tokenizer lies here")
        elif _FOR_LOADERS.fullmatch(name) and not _moved_template(name, target):
            findings.fault("file-missing", name, "lies beside the source and not here; copy it")
    for name in sorted(here - set(source.side_files)):
        if name.endswith((".jinja", ".py")) and not _moved_template(name, source):
            findings.fault("file-added", name, "lies here and not beside the source, and loaders read files of this name")


def _moved_template(name: str, other: Checkpoint) -> bool:
    """Newer tools keep a chat template in a file of its own, older ones in tokenizer_config.json."""
    if name != "chat_template.jinja":
        return False
    found = _json_of(other.root / "tokenizer_config.json")
    return isinstance(found, dict) and "chat_template" in found


def _check_config(before: Mapping[str, Any], after: Mapping[str, Any], specs: SpecMap, findings: Findings) -> None:
    stored = {spec.dtype.name for spec in specs.values()}
    for path, old, new in differences(before, after):
        key = path.rpartition(".")[2]
        where = f"{CONFIG_NAME} {path}"
        if key in _NEUTRAL or key in _QUANTIZATION_KEYS:
            continue
        if key in _DTYPE_KEYS and (new is _ABSENT or _DTYPES.get(str(new)) in stored):
            continue
        if old is _ABSENT and key not in _DTYPE_KEYS and not (new and _DECIDES.search(key)):
            findings.note("config-key", where, f"is {_shown(new)}, and the source has no such key")
        elif old in (None, False, "", 0) and new is _ABSENT:
            findings.note("config-key", where, f"is not here; the source says {_shown(old)}")
        else:
            findings.fault(
                "config-differs", where,
                f"is {_shown(new)}, but the source says {_shown(old)}: the model would compute something else",
            )  # fmt: skip


def _compare_file(name: str, one: Path, other: Path, findings: Findings) -> None:
    if one.stat().st_size == other.stat().st_size and digest_of_file(one) == digest_of_file(other):
        return
    before, after = (_json_of(one), _json_of(other)) if name.endswith(".json") else (_ABSENT, _ABSENT)
    if not isinstance(before, dict) or not isinstance(after, dict):
        if before is _ABSENT or before != after:
            findings.fault("file-differs", name, "is not the source's; copy it again")
        return
    for path, old, new in differences(before, after):
        key = path.rpartition(".")[2]
        if key in _NEUTRAL or (path == "chat_template" and (other.parent / "chat_template.jinja").is_file()):
            continue
        if old is _ABSENT and not name.startswith("tokenizer"):
            findings.note("file-differs", f"{name} {path}", f"is {_shown(new)}, and the source has no such key")
        else:
            findings.fault("file-differs", f"{name} {path}", f"is {_shown(new)}, but the source says {_shown(old)}")
            return


def differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> Iterator[Difference]:
    """Keys whose values differ, in both orders of nesting; lists are compared whole."""
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if old is new or (old is not _ABSENT and new is not _ABSENT and old == new):
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping) and key not in _QUANTIZATION_KEYS:
            yield from differences(old, new, f"{path}{key}.")
        else:
            yield Difference(f"{path}{key}", old, new)


def _json_of(path: Path) -> Any:
    """The content of a JSON file; ``_ABSENT`` if it is none that can be read."""
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            return _ABSENT
        return json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return _ABSENT


def _shown(value: Any) -> str:
    """A value in a message, in one line and cut where it is long."""
    if value is _ABSENT:
        return "missing"
    text = ascii(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."

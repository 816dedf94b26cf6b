"""What vLLM's own model class said of an architecture: which linears it builds with a quantization config, and how fused.

``vllm.json`` is made by ``tests/families/ask_vllm.py``; each entry says whether the class was asked, or its source read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from tensorsurgeon.models.fused import fused_name

_FILE: Final = Path(__file__).with_name("vllm.json")


class Answer(NamedTuple):
    """An engine's answer for one architecture.

    ``how``: asked or read. ``takes``, ``never``: paths within a layer, numbers as ``*`` and fused as the engine has them,
    of linears that it builds with a quantization config, and without. ``fused``: the engine's linear and its parts.
    """

    engine: str
    architecture: str
    how: str
    takes: frozenset[str]
    never: frozenset[str]
    fused: Mapping[str, tuple[str, ...]]

    def builds_without_config(self, path: str) -> bool:
        """Whether the engine builds the linear at this path of a layer, or the one it is fused into, without a config."""
        parent, dot, leaf = path.rpartition(".")
        names = {path, fused_name(path) or path}
        names.update(parent + dot + fused for fused, parts in self.fused.items() if leaf in parts)
        # A vision tower's layers may be called like the text model's.
        return not names.isdisjoint(self.never) and names.isdisjoint(self.takes)


def answer_for(config: Mapping[str, Any]) -> Answer | None:
    """The answer for a model by its architecture, then by its model_type; None if it was not asked for."""
    architectures, by_type = _entries()
    said = config.get("architectures")
    names = [name for name in said if isinstance(name, str)] if isinstance(said, list) else []
    names += [by_type[kind] for kind in _types(config) if kind in by_type]
    return next((_answer(name) for name in names if name in architectures), None)


def _types(config: Mapping[str, Any]) -> list[str]:
    parts = (config, config.get("text_config"))
    return [part["model_type"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("model_type"), str)]


@cache
def _document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_FILE.read_bytes())
    return found


@cache
def _entries() -> tuple[frozenset[str], dict[str, str]]:
    entries = _document()["architectures"]
    usable = {name: entry for name, entry in entries.items() if "takes" in entry}
    return frozenset(usable), {kind: name for name, entry in usable.items() for kind in entry["model_types"]}


@cache
def _answer(architecture: str) -> Answer:
    entry = _document()["architectures"][architecture]
    return Answer(
        _document()["engine"],
        architecture,
        entry["how"],
        frozenset(map(_inside, entry["takes"])),
        frozenset(map(_inside, entry.get("never") or ())),
        {fused: tuple(parts) for fused, parts in (entry.get("fused") or {}).items()},
    )


def _inside(path: str) -> str:
    """A path behind the first number; the whole of it if it lies in no layer."""
    return path.partition(".*.")[2] or path

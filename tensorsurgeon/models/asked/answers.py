"""What engines' own model classes say of a model.

``vllm.json`` is made by ``tests/families/ask_vllm.py``: which linears vLLM builds with a quantization config, and how fused;
each entry says whether the class was asked, or its source read. ``transformers.json`` is made by
``tests/families/read_transformers.py``: which classes hold the experts of a layer stacked and gather none stored one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from tensorsurgeon.models.experts import is_expert_list
from tensorsurgeon.models.fused import Fusions, fused_name

_FILE: Final = Path(__file__).with_name("vllm.json")
# What stands before the path within a layer.
_LAYER: Final = re.compile(r".*?\.\d+\.")
_STACKS: Final = Path(__file__).with_name("transformers.json")


class Answer(NamedTuple):
    """An engine's answer for one architecture.

    ``how``: asked or read. ``takes``, ``never``: paths within a layer, numbers as ``*`` and fused as the engine has them,
    of linears that it builds with a quantization config, and without. ``fused``: the engine's linear and its parts, as it
    declares them; ``stacked``: what its loader puts together besides. ``renames``: what it calls modules otherwise than the
    file, one change after the other: kind (``regex``, ``substring`` or ``prefix``), what is found, what takes its place.
    ``experts``: by what names it looks for the matrices of an expert stored by itself; none where the class was not asked.
    """

    engine: str
    architecture: str
    how: str
    takes: frozenset[str]
    never: frozenset[str]
    fused: Mapping[str, tuple[str, ...]]
    stacked: Mapping[str, tuple[str, ...]]
    renames: tuple[tuple[str, str, str], ...]
    experts: frozenset[str]

    def engines_name(self, module: str) -> str:
        """What the engine calls a linear or an expert list of the file."""
        name = self.renamed(module)
        layer = _LAYER.match(name)
        lists = {path for path in self.takes if path.rpartition(".")[2] == "experts"}
        if layer is None or not is_expert_list(module) or name[layer.end() :] in lists or len(lists) != 1:
            return name
        return layer[0] + next(iter(lists))

    def renamed(self, module: str) -> str:
        """A name as the engine's WeightsMapper changes it: each change once, in its order."""
        for kind, old, new in self.renames:
            if kind == "regex":
                module = re.sub(old, new, module)
            elif kind == "substring" or module.startswith(old):
                module = module.replace(old, new, 1)
        return module

    def fusions(self) -> Fusions:
        """What this class runs as one linear."""
        return Fusions([*self.fused.items(), *self.stacked.items()], self.takes | self.never)

    def builds_without_config(self, path: str) -> bool:
        """Whether the engine builds the linear at this path of a layer, or the one it is fused into, without a config."""
        parent, dot, leaf = path.rpartition(".")
        names = {path, fused_name(path) or path}
        names.update(parent + dot + fused for fused, parts in self.fused.items() if leaf in parts)
        # A vision tower's layers may be called like the text model's.
        return not names.isdisjoint(self.never) and names.isdisjoint(self.takes)


class StackForm(NamedTuple):
    """How a class of transformers holds ``gate_up_proj`` and ``down_proj`` of all experts: the axes of each expert's matrix,
    and whether gate and up alternate."""

    axes: tuple[str, str]
    interleaved: bool


def stacks_wanted(config: Mapping[str, Any]) -> StackForm | None:
    """The form in which transformers' class wants this model's experts; None if it gathers them, or is not known."""
    found = next((entry for kind in reversed(_types(config)) if (entry := _stack_forms().get(kind)) is not None), None)
    if found is None:
        return None
    first, second = found.get("axes", ("out", "in"))
    return StackForm((first, second), bool(found.get("interleaved")))


@cache
def _stack_forms() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(_STACKS.read_bytes())["stacks"]
    return found


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
    usable = {name: entry for name, entry in entries.items() if "takes" in entry or "never" in entry}
    return frozenset(usable), {kind: name for name, entry in usable.items() for kind in entry["model_types"]}


@cache
def _answer(architecture: str) -> Answer:
    entry = _document()["architectures"][architecture]
    return Answer(
        _document()["engine"],
        architecture,
        entry["how"],
        frozenset(map(_inside, entry.get("takes") or ())),
        frozenset(map(_inside, entry.get("never") or ())),
        {fused: tuple(parts) for fused, parts in (entry.get("fused") or {}).items()},
        {fused: tuple(parts) for fused, parts in (entry.get("stacked") or {}).items()},
        tuple(
            (kind, old, new)
            for kind in ("regex", "substring", "prefix")
            for old, new in ((entry.get("names") or {}).get(kind) or {}).items()
            if new is not None
        ),
        frozenset((entry.get("experts") or {}).values()),
    )


def _inside(path: str) -> str:
    """A path behind the first number; the whole of it if it lies in no layer."""
    return path.partition(".*.")[2] or path

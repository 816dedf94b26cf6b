"""What is known of one family by name: the data files in ``families/``, one per architecture.

A table says what structure cannot tell: halves of a stack that lie interleaved, linears that an engine builds without
its quantization config, roles that a name hides. Everything else follows from ``rules.py`` and need not be repeated.

    model_types: [gpt_oss]                      the config's model_type, its text_config's too; one line
    architectures: [GptOssForCausalLM]
    evidence: read                              served, asked or read, and of what (docs/families.md has the words)
    roles:                                      role -> patterns of module paths, numbers as they are
      router: ["{path*}.mlp.router"]
    without_config: ["{path*}.mamba.in_proj"]   linears that engines build unquantized
    transposed: ["{path*}.c_attn"]              linears that are stored [in, out]
    experts:                                    tensors that hold the experts of a layer (``stacks.py``)
      - {tensor: mlp.experts.gate_up_proj, axes: [in, out], parts: [gate_proj, up_proj], interleaved: true}
    unread_experts:                             engine -> why it does not find quantized experts that are stored one by one
      vllm: its loader takes stacks only
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from tensorsurgeon.errors import RecipeError
from tensorsurgeon.models.roles import Role
from tensorsurgeon.tensors.names import Pattern

_FOLDER: Final = Path(__file__).parent / "families"
_NAMES: Final = re.compile(r"^(?:model_types|architectures): \[(.*)\]$", re.MULTILINE)


_KEYS: Final = (
    "model_types",
    "architectures",
    "evidence",
    "roles",
    "without_config",
    "transposed",
    "experts",
    "unread_experts",
    "notes",
)


class Stack(NamedTuple):
    """A tensor that holds the experts of a layer.

    ``tensor``: its path in the layer. ``axes``: of one expert's matrix as it is stored, ``out`` and ``in``. ``flat``: the
    experts lie below each other, [E * rows, columns]. ``parts``: the linears in it, along ``out``, one after the other or
    ``interleaved``. ``into``: the path in the layer that the experts get when they are stored one by one.
    """

    tensor: str
    into: str
    parts: tuple[str, ...]
    axes: tuple[str, str] = ("out", "in")
    flat: bool = False
    interleaved: bool = False


class Family(NamedTuple):
    """One data file. ``name``: the file's; ``evidence``: where its statements are from."""

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    evidence: str
    roles: tuple[tuple[Pattern, Role], ...]
    without_config: tuple[Pattern, ...]
    transposed: tuple[Pattern, ...]
    experts: tuple[Stack, ...]
    unread_experts: tuple[tuple[str, str], ...] = ()


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a model by its config: the text model's model_type, the whole's, then the architecture."""
    text = config.get("text_config")
    words = [part.get("model_type") for part in (text, config) if isinstance(part, Mapping)]
    architectures = config.get("architectures")
    words += architectures if isinstance(architectures, list) else []
    index = _index()
    return next((read_family(index[word]) for word in words if isinstance(word, str) and word in index), None)


def family_names() -> list[str]:
    """The families that there are data files for."""
    return sorted({path.stem for path in _index().values()})


@cache
def _index() -> dict[str, Path]:
    # Only the two lines are read that say whom a file is for: parsing them all would take longer than a plan.
    found: dict[str, Path] = {}
    for path in sorted(_FOLDER.glob("*.yaml")):
        for names in _NAMES.findall(path.read_text(encoding="utf-8")):
            found.update((word.strip(), path) for word in names.split(",") if word.strip())
    return found


@cache
def read_family(path: Path) -> Family:
    """Parse a data file; RecipeError names a fault in it."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = set(data) - {*_KEYS}
    if unknown or not isinstance(data.get("evidence"), str):
        raise RecipeError(f"{path}: unknown keys {sorted(unknown)}" if unknown else f"{path}: evidence is missing")
    roles = tuple((Pattern.parse(text), Role(role)) for role, texts in (data.get("roles") or {}).items() for text in texts)
    return Family(
        path.stem,
        tuple(data.get("model_types") or ()),
        tuple(data.get("architectures") or ()),
        data["evidence"],
        roles,
        tuple(map(Pattern.parse, data.get("without_config") or ())),
        tuple(map(Pattern.parse, data.get("transposed") or ())),
        tuple(_stack(path, entry) for entry in data.get("experts") or ()),
        tuple((data.get("unread_experts") or {}).items()),
    )


def _stack(path: Path, entry: Mapping[str, Any]) -> Stack:
    axes = tuple(entry.get("axes", ("out", "in")))
    if sorted(axes) != ["in", "out"]:
        raise RecipeError(f"{path}: axes of {entry.get('tensor')} are [out, in] or [in, out], found {list(axes)}")
    into = entry.get("into") or str(entry["tensor"]).rpartition(".")[0]
    return Stack(
        entry["tensor"],
        into,
        tuple(entry["parts"]),
        (axes[0], axes[1]),
        bool(entry.get("flat")),
        bool(entry.get("interleaved")),
    )

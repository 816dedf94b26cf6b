"""How the experts of a layer are called on disk: numbered one by one, or stacked in one tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from tensorsurgeon.tensors.spec import TensorSpec

EXPERTS: Final = ".experts."
_LIST: Final = ".experts"
_LENGTH: Final = len(EXPERTS)

GATED: Final = (frozenset(("gate_proj", "up_proj", "down_proj")), frozenset(("w1", "w2", "w3")))
"""The linears of an expert that multiplies by a gate, in the spellings there are."""

STACKED_PARTS: Final[dict[str, tuple[str, ...]]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Stacked tensor -> the linears of each expert in it, in the order of their rows."""


class Numbered(NamedTuple):
    """A module of a numbered expert: ``x.mlp.experts``, ``7``, ``up_proj``."""

    experts: str
    number: str
    leaf: str


def numbered(module: str) -> Numbered | None:
    """The parts of ``x.mlp.experts.7.up_proj``; None for whatever is no numbered expert."""
    at = module.find(EXPERTS)
    if at < 0:
        return None
    number, _, leaf = module[at + _LENGTH :].partition(".")
    return Numbered(module[: at + _LENGTH - 1], number, leaf) if number.isdigit() else None


def any_expert(name: str) -> str | None:
    """``x.mlp.experts.*.up_proj.weight`` for ``x.mlp.experts.7.up_proj.weight``, alike for all experts of a list; None for what
    is no numbered expert's."""
    at = name.find(EXPERTS)
    if at < 0:
        return None
    start = at + _LENGTH
    stop = name.find(".", start)
    if stop < 0:
        stop = len(name)
    return f"{name[:start]}*{name[stop:]}" if name[start:stop].isdigit() else None


def experts_of(module: str) -> str | None:
    """``x.mlp.experts`` for ``x.mlp.experts.7.up_proj``; None if the module is no numbered expert."""
    at = module.find(EXPERTS)
    if at < 0:
        return None
    stop = at + _LENGTH
    return module[: stop - 1] if module[stop : stop + 1].isdigit() else None


def expert_list(module: str) -> str | None:
    """``x.mlp.experts`` for everything below it, numbered or stacked; None for other modules."""
    at = module.find(EXPERTS)
    return module[: at + _LENGTH - 1] if at >= 0 else None


def is_expert_list(module: str) -> bool:
    """Whether a module is itself a list of experts (``x.mlp.experts``)."""
    return module.endswith(_LIST)


def stack_of(name: str) -> str | None:
    """``x.mlp.experts`` for the stacked tensor ``x.mlp.experts.gate_up_proj``; None for other names."""
    parent = name.removesuffix(".weight").rpartition(".")[0]
    return parent if parent.endswith(_LIST) else None


def stacked_experts(specs: Iterable[TensorSpec]) -> dict[str, TensorSpec]:
    """``x.mlp.experts`` -> one of its three-dimensional tensors."""
    found: dict[str, TensorSpec] = {}
    for spec in specs:
        if len(spec.shape) == 3 and (prefix := stack_of(spec.name)) is not None:
            found.setdefault(prefix, spec)
    return found


def after_splitting(stacked: str) -> str | None:
    """The weight of the first expert that splitting a stacked tensor makes, by name; None if it is no stack."""
    module, _, leaf = stacked.rpartition(".")
    if not is_expert_list(module):
        return None
    part = STACKED_PARTS.get(leaf, (f"{leaf.removesuffix('_proj')}_proj",))[0]
    return f"{module}.0.{part}.weight"

"""Group the weights that engines fuse into one module and that must therefore share a global scale."""

from __future__ import annotations

from collections.abc import Iterable

from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.tensors.spec import SpecMap


def sibling_groups(specs: SpecMap, weights: Iterable[str]) -> list[list[str]]:
    """Weight names, those of one fused module together, in the order in which each group begins."""
    fused_name = describe_model(specs).fused_name
    groups: dict[str, list[str]] = {}
    for name in weights:
        module, _, last = name.rpartition(".")
        groups.setdefault(f"{fused_name(module) or module}.{last}", []).append(name)
    return list(groups.values())

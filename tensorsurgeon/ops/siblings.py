"""Group the weights that engines fuse into one module and that must therefore share a global scale."""

from __future__ import annotations

from collections.abc import Iterable

from tensorsurgeon.models.fused import fused_name


def sibling_groups(weights: Iterable[str]) -> list[list[str]]:
    """Weight names, those of one fused module together, in the order in which each group begins."""
    groups: dict[str, list[str]] = {}
    for name in weights:
        module, _, last = name.rpartition(".")
        groups.setdefault(f"{fused_name(module) or module}.{last}", []).append(name)
    return list(groups.values())

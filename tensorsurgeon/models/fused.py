"""Linears that engines fuse into one, and which therefore are quantized together or not at all.

Which these are an engine's class says where it was asked (``asked/``); ``FUSED`` is what most classes fuse, and what counts
for a model that nobody was asked about.

vLLM and SGLang load ``q_proj``, ``k_proj`` and ``v_proj`` into one ``qkv_proj`` with one kernel. A config that
quantizes some of them, or quantizes them in several ways, is refused there with "different quantization schemes"
(vLLM 0.32, ``should_ignore_layer``), after the checkpoint was made. The experts of one layer are one kernel too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from tensorsurgeon.errors import SpecError
from tensorsurgeon.quant.scheme import Scheme

FUSED: Final[dict[str, tuple[str, ...]]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "w13": ("w1", "w3"),
    "fused_wqa_wkv": ("wq_a", "wkv"),
}
"""The fused module's last name part and its parts', in the order in which they are stacked."""

FUSED_NAME: Final = {part: fused for fused, parts in FUSED.items() for part in parts}


def fused_name(module: str) -> str | None:
    """What an engine calls the module this one is fused into; None if it stands alone."""
    parent, dot, leaf = module.rpartition(".")
    fused = FUSED_NAME.get(leaf)
    return None if fused is None else parent + dot + fused


class Fusions:
    """What the engine fuses of one model. ``declared``: the fused path and its parts', as the engine's class has them (a part
    may be a path: ``shared_expert.up_proj``); ``paths``: its linears as they are built, fused."""

    def __init__(self, declared: Iterable[tuple[str, Collection[str]]], paths: Collection[str]) -> None:
        leaves = {path.rpartition(".")[2] for path in paths}
        # The class builds a part by itself: what others fuse it does not.
        usual = [(name, parts) for name, parts in FUSED.items() if name in leaves or leaves.isdisjoint(parts)]
        several = [(name, parts) for name, parts in declared if len(parts) > 1]
        self._of: dict[str, dict[str, frozenset[str]]] = {}
        for name, parts in [*several, *usual]:
            for part in parts:
                known = self._of.setdefault(part.rpartition(".")[2], {})
                known[name] = known.get(name, frozenset()) | frozenset(parts)

    def name(self, module: str, modules: Callable[[], Collection[str]]) -> str | None:
        """What the engine calls the module that this one is fused into; None if it stands alone.

        ``modules`` are asked for where classes fuse a part of this name in several ways: the one counts of which most is there.
        """
        leaf = module.rpartition(".")[2]
        ways = self._of.get(leaf)
        if ways is None:
            return None
        found = [way for name, parts in ways.items() if (way := _placed(module, leaf, name, parts)) is not None]
        if len(found) > 1:
            there = modules()
            found.sort(key=lambda way: (-sum(f"{way[0]}{part}" in there for part in way[2]), len(way[2])))
        return found[0][0] + found[0][1] if found else None


def _placed(module: str, leaf: str, name: str, parts: Collection[str]) -> tuple[str, str, Collection[str]] | None:
    """Where the parts' paths begin in the name of a module that is one of them, and the fused path behind that."""
    for part in parts:
        if part.rpartition(".")[2] == leaf and (module == part or module.endswith("." + part)):
            return module[: len(module) - len(part)], name, parts
    return None


def check_siblings(
    linears: Mapping[str, Scheme], unquantized: Iterable[str], fused_name: Callable[[str], str | None] = fused_name
) -> None:
    """SpecError if linears that engines fuse are not all quantized under one scheme, or all left alone.

    ``linears``: quantized modules but for numbered experts, which ``coverage`` checks while it counts them.
    """
    schemes: dict[str, tuple[str, Scheme]] = {}
    for module, scheme in linears.items():
        fused = fused_name(module)
        if fused is None:
            continue
        other, other_scheme = schemes.setdefault(fused, (module, scheme))
        if other_scheme is not scheme and other_scheme != scheme:
            raise SpecError(
                f"{other} and {module} have different schemes ({describe(other_scheme)}; {describe(scheme)}), but "
                f"engines fuse them into {fused}: give both the same scheme"
            )
    for module in unquantized:
        fused = fused_name(module)
        if fused in schemes:
            raise SpecError(
                f"{schemes[fused][0]} is quantized and {module} is not, but engines fuse them into {fused}: "
                "quantize both or neither"
            )


def describe(scheme: Scheme) -> str:
    """A scheme in the few words that tell it from others."""
    shape = "one scale" if scheme.group_size == 0 else f"group_size {scheme.group_size}"
    if scheme.block:
        shape = f"block {list(scheme.block)}"
    kind = "" if scheme.symmetric else ", asymmetric"
    return f"{scheme.type} {scheme.num_bits} bits, {shape}{kind}"

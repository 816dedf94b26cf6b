"""How compressed-tensors configs name modules, as its readers match them.

An entry with ``re:`` is matched from the start of the name and not to its end; any other entry is a whole module
name, or the name of a class (``Linear``). vLLM matches the *fused* name first, so an expression without ``$`` for
``in_proj_b`` swallows ``in_proj_ba``; and it renames plain entries (``model.language_model.x`` becomes
``language_model.model.x``) but never expressions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tensorsurgeon.formats.coverage import Coverage
from tensorsurgeon.models.mtp import head_expressions, named_apart
from tensorsurgeon.models.patterns import exact_pattern, patterns_for, renamed_by_loaders, spellings
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.expressions import Expression

ALL_LINEARS: Final = "Linear"


class Matcher:
    """The entries of one ``targets`` or ``ignore`` list, ready to be asked about many names."""

    def __init__(self, entries: Iterable[str]) -> None:
        entries = tuple(entries)
        self.exact = frozenset(e for e in entries if not e.startswith("re:"))
        self.expressions = [Expression.of_config(e.removeprefix("re:")) for e in entries if e.startswith("re:")]

    def matches(self, module: str) -> bool:
        """Whether an entry names this module, as the file calls it or as loaders do; class names do not count."""
        return any(name in self.exact or any(e.match(name) for e in self.expressions) for name in (module, *spellings(module)))

    @property
    def takes_all_linears(self) -> bool:
        """Whether the class name of all linears is an entry."""
        return ALL_LINEARS in self.exact


def ignore_list(coverage: Coverage) -> list[str]:
    """Every unquantized module by its exact name; expert lists and an unquantized MTP head by expressions.

    Engines ask for a layer's experts as ``<layer>.mlp.experts.0.gate_proj``, also where the file has them fused. Of an MTP head
    that is quantized in part, each float linear is an expression: plain names under ``mtp.`` are dropped. Where transformers
    calls modules otherwise than the file, expressions say the same in its names.
    """
    quantized = coverage.quantized_names()
    lists = coverage.spelled(coverage.float_experts)
    experts = patterns_for(lists, lists, quantized)
    return [
        *(f"re:{exact_pattern(name)}" if named_apart(name) else name for name in coverage.float_linears),
        *(f"re:{pattern}" for pattern in experts),
        *(["lm_head"] if coverage.tied_head else []),
        *(f"re:{pattern}" for pattern in head_expressions(coverage.float_mtp)),
        *(f"re:{pattern}" for pattern in loaders_names(coverage)),
    ]


def loaders_names(coverage: Coverage) -> list[str]:
    """Expressions for the float linears that a loader may know by other names than the file."""
    if not coverage.has_parts:
        return []
    return renamed_by_loaders(
        coverage.float_linears, [*coverage.float_linears, *coverage.linears, *coverage.experts], coverage.quantized_names()
    )


def target_lists(coverage: Coverage) -> dict[Scheme, list[str]]:
    """The ``targets`` of each scheme: ``Linear`` for a single one, expressions to the end of the name for several."""
    groups = coverage.schemes()
    if len(groups) == 1:
        scheme = next(iter(groups))
        # vLLM's output head is no Linear, so that word alone would leave it out.
        head = [f"re:{exact_pattern('lm_head')}"] if "lm_head" in coverage.linears else []
        return {scheme: [ALL_LINEARS, *head]}
    targets = {}
    for scheme, modules in groups.items():
        others = [m for other, listed in groups.items() if other != scheme for m in listed]
        avoid = coverage.spelled([*others, *coverage.float_linears, *coverage.float_experts])
        patterns = patterns_for(coverage.spelled(modules), coverage.spelled(coverage.experts), avoid)
        targets[scheme] = [f"re:{pattern}" for pattern in patterns]
    return targets

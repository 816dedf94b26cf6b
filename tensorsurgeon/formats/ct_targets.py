"""How compressed-tensors configs name modules, as its readers match them.

An entry with ``re:`` is matched from the start of the name and not to its end; any other entry is a whole module
name, or the name of a class (``Linear``). vLLM matches the *fused* name first, so an expression without ``$`` for
``in_proj_b`` swallows ``in_proj_ba``; and it renames plain entries (``model.language_model.x`` becomes
``language_model.model.x``) but never expressions, so an expression must not contain the part that changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from tensorsurgeon.errors import SpecError
from tensorsurgeon.formats.coverage import MTP, Coverage
from tensorsurgeon.quant.grid import Scheme

ALL_LINEARS: Final = "Linear"
MTP_IGNORED: Final = "re:^mtp.*"
_ALL_EXPERTS: Final = r"re:.*\.experts\.\d+\..*"
# What engines put in front of a layer's name, in any of their spellings.
_RENAMED: Final = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_PREFIXES: Final = r"(model\.)?(language_model\.)?(model\.)?"


class Matcher:
    """The entries of one ``targets`` or ``ignore`` list, ready to be asked about many names."""

    def __init__(self, entries: Iterable[str]) -> None:
        entries = tuple(entries)
        self.exact = frozenset(e for e in entries if not e.startswith("re:"))
        self.expressions = [re.compile(e.removeprefix("re:")) for e in entries if e.startswith("re:")]

    def matches(self, module: str) -> bool:
        """Whether an entry names this module; class names do not count."""
        return module in self.exact or any(e.match(module) for e in self.expressions)

    @property
    def takes_all_linears(self) -> bool:
        """Whether the class name of all linears is an entry."""
        return ALL_LINEARS in self.exact


def ignore_list(coverage: Coverage) -> list[str]:
    """Every unquantized module by its exact name; expert lists and an unquantized MTP head by expressions.

    Engines ask for a layer's experts as ``<layer>.mlp.experts.0.gate_proj``, also where the file has them fused.
    """
    ignored = [*coverage.float_linears]
    ignored += [f"re:{e}" for e in _expert_expressions(coverage)]
    if coverage.tied_head:
        ignored.append("lm_head")
    if coverage.float_mtp:
        ignored.append(MTP_IGNORED)
    swallowed = Matcher(ignored)
    for module in coverage.quantized_names():
        if swallowed.matches(module):
            raise SpecError(f"{module} is quantized, but the ignore list {ignored} would keep it out")
    return ignored


def _expert_expressions(coverage: Coverage) -> list[str]:
    lists = coverage.float_experts
    if not lists:
        return []
    if not coverage.experts:
        return [_ALL_EXPERTS.removeprefix("re:")]
    return [_prefix_free(prefix) + r"\.\d+\..*" for prefix in lists]


def target_lists(coverage: Coverage) -> dict[Scheme, list[str]]:
    """The ``targets`` of each scheme: ``Linear`` for a single one, expressions to the end of the name for several.

    Layers of the same kind share one expression. SpecError if an expression hits a module of another scheme.
    """
    groups = coverage.schemes()
    if len(groups) == 1:
        scheme = next(iter(groups))
        # vLLM's output head is no Linear, so that word alone would leave it out.
        head = [f"re:{_prefix_free('lm_head')}$"] if "lm_head" in coverage.linears else []
        return {scheme: [ALL_LINEARS, *head]}
    kinds: dict[str, set[Scheme]] = {}
    for scheme, modules in groups.items():
        for module in modules:
            kinds.setdefault(_kind(module, coverage), set()).add(scheme)
    targets: dict[Scheme, list[str]] = {}
    for scheme, modules in groups.items():
        found: dict[str, None] = {}
        for module in modules:
            kind = _kind(module, coverage)
            found[kind if len(kinds[kind]) == 1 else _pattern(module, coverage)] = None
        targets[scheme] = [f"re:{pattern}" for pattern in found]
    _check_disjoint(groups, targets, coverage)
    return targets


def _check_disjoint(groups: Mapping[Scheme, Sequence[str]], targets: Mapping[Scheme, list[str]], coverage: Coverage) -> None:
    matchers = {scheme: Matcher(entries) for scheme, entries in targets.items()}
    ignored = Matcher(ignore_list(coverage))
    for scheme, modules in groups.items():
        for module in modules:
            name = module if module in coverage.linears else f"{module}.0.{coverage.expert_leaves[0]}"
            hits = [entries for s, entries in targets.items() if matchers[s].matches(name)]
            if hits != [targets[scheme]]:
                raise SpecError(f"{name}: no expression tells it from modules of other schemes, tried {targets[scheme]}")
    for matcher in matchers.values():
        for module in coverage.float_linears:
            if matcher.matches(module) and not ignored.matches(module):
                raise SpecError(f"{module} is not quantized, but a target of the config matches it")


def _kind(module: str, coverage: Coverage) -> str:
    """An expression for this module in every layer."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", _pattern(module, coverage))


def _pattern(module: str, coverage: Coverage) -> str:
    body = _prefix_free(module)
    return body + (r"\.\d+\..*" if module in coverage.experts else "$")


def _prefix_free(module: str) -> str:
    r"""An expression for the module under HF's and vLLM's name: ``...layers\.3\.mlp`` behind optional prefixes.

    MTP and vision towers have layers of their own, which these prefixes do not reach.
    """
    for prefix in _RENAMED:
        if module.startswith(prefix):
            return _PREFIXES + re.escape(module.removeprefix(prefix))
    return re.escape(module) if module.startswith(MTP) else _PREFIXES + re.escape(module)

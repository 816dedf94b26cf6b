"""GPTQModel's ``dynamic`` rules: which modules are not quantized, and which differently from the rest.

Rules are tried in order, by ``re.match``, and the first that matches decides: ``-:pattern`` leaves a module alone,
``+:pattern`` (or a bare pattern) overrides bits, group_size and sym. vLLM matches its own fused names, so a rule
must also hit ``in_proj_ba`` where it is meant for ``in_proj_b``; it quantizes experts unless a rule forbids it; and
its MTP model stays unquantized only if a ``-:`` key contains ``mtp`` (formats.md section 2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tensorsurgeon.errors import ConfigError, SpecError
from tensorsurgeon.formats.config_reading import TOP, boolean, integer
from tensorsurgeon.formats.coverage import Coverage
from tensorsurgeon.models.mtp import MTP_RULE, MTP_WORD, head_expressions, head_paths
from tensorsurgeon.models.patterns import patterns_for, spellings
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.expressions import Expression


def base_scheme(coverage: Coverage) -> Scheme:
    """What the config says at its top: the experts' scheme if there are experts, else the commonest."""
    groups = coverage.schemes()
    return max(groups, key=lambda scheme: (any(m in coverage.experts for m in groups[scheme]), len(groups[scheme])))


def dynamic_rules(coverage: Coverage) -> dict[str, dict[str, Any]]:
    """Rules for everything that is not quantized under the base scheme; exclusions first."""
    quantized = coverage.quantized_names()
    quantized = [*coverage.spelled([*quantized, *coverage.experts]), *coverage.fused(quantized)]
    left = [*coverage.spelled(coverage.left_out()), *coverage.fused(coverage.float_linears)]
    rules: dict[str, dict[str, Any]] = {
        f"-:{pattern}": {} for pattern in patterns_for(dict.fromkeys(left), coverage.spelled(coverage.float_experts), quantized)
    }
    for path, expression in zip(head_paths(coverage.float_mtp), head_expressions(coverage.float_mtp), strict=True):
        # vLLM looks for the word itself in a rule.
        rule = MTP_RULE if path == MTP_WORD else f"-:{expression}"
        named = next((name for name in quantized if re.match(rule.removeprefix("-:"), name)), None)
        if named is not None:
            raise SpecError(f"{named} is quantized, but the rule {rule!r} for the MTP head would keep it out")
        rules[rule] = {}
    base = base_scheme(coverage)
    groups = coverage.schemes()
    for scheme, modules in groups.items():
        if scheme == base:
            continue
        others = [m for other, listed in groups.items() if other != scheme for m in listed]
        named_modules = dict.fromkeys([*coverage.spelled(modules), *coverage.fused(modules)])
        avoid = [*coverage.spelled(others), *coverage.fused(others)]
        for pattern in patterns_for(named_modules, coverage.spelled(coverage.experts), avoid):
            rules[f"+:{pattern}"] = {
                "bits": scheme.num_bits,
                "group_size": scheme.group_size,
                "sym": scheme.symmetric,
            }
    return rules


class DynamicRules:
    """A ``dynamic`` mapping as read; ConfigError for a rule that cannot be compiled or meant."""

    def __init__(self, dynamic: Any, base: Scheme) -> None:
        if dynamic is None:
            dynamic = {}
        if not isinstance(dynamic, Mapping):
            raise ConfigError(f"{TOP}.dynamic: expected a mapping, found {dynamic!r}")
        self.base = base
        self.rules: list[tuple[Expression, Scheme | None]] = []
        for key, overrides in dynamic.items():
            path = f"{TOP}.dynamic.{key}"
            try:
                pattern = Expression(key.removeprefix("-:").removeprefix("+:"))
            except re.error as error:
                raise ConfigError(f"{path}: not a valid expression: {error}") from error
            self.rules.append((pattern, None if key.startswith("-:") else _overridden(base, overrides, path)))

    def scheme_for(self, module: str) -> Scheme | None:
        """The scheme of a module, as the file or a loader calls it; None where a rule leaves it alone."""
        names = (module, *spellings(module))
        for pattern, scheme in self.rules:
            if any(map(pattern.match, names)):
                return scheme
        return self.base


def _overridden(base: Scheme, overrides: Mapping[str, Any], path: str) -> Scheme:
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"{path}: expected a mapping, found {overrides!r}")
    if overrides.get("desc_act"):
        raise ConfigError(f"{path}.desc_act: found true; weights in activation order cannot be read")
    return replace(
        base,
        num_bits=integer(overrides, "bits", path, default=base.num_bits),
        group_size=integer(overrides, "group_size", path, default=base.group_size),
        symmetric=boolean(overrides, "sym", path, default=base.symmetric),
    )

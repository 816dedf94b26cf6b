"""How the codes of a plan are chosen, in words: a layout that is called as an algorithm is says nothing of that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from tensorsurgeon.formats.registry import name_of
from tensorsurgeon.planning.plan import Plan

METHODS: Final = {
    "rtn": "rounded to nearest (RTN)",
    "gptq": "chosen by GPTQ",
    "imatrix": "chosen by importance matrix",
    "signround": "chosen by SignRound",
    "kept": "with the codes they had",
}
NAMED_AS_ALGORITHMS: Final = {
    "gptq": "GPTQ",
    "gptq-v2": "GPTQ",
    "awq": "AWQ",
    "autoround": "AutoRound",
    "autoround-awq": "AutoRound",
}
"""Layouts with the name of an algorithm, and the algorithm's."""


def codes_text(plan: Plan, chosen: Mapping[str, int] | None = None) -> str:
    """One line; ``chosen``: how many linears each method came to, where a run has shown it. Empty where nothing is quantized."""
    counted = Counter(chosen) if chosen else Counter(written.method for written in plan.written.values())
    said = ", ".join(f"{count} linears {METHODS.get(method, method)}" for method, count in counted.most_common())
    names = {name_of(written.format) for written in plan.ways if written.method == "rtn"}
    algorithms = sorted({NAMED_AS_ALGORITHMS[name] for name in names if name in NAMED_AS_ALGORITHMS})
    if algorithms and set(counted) == {"rtn"}:
        said += f"; {' and '.join(algorithms)} is the layout's name, not what chose the codes: calibration chooses them by GPTQ"
    return said

"""What advice is, and what every loader's rules are told.

Advice is made when the plan is made, from names, shapes and the config alone, so that a checkpoint that an engine will
refuse is known before an hour is spent on writing it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from tensorsurgeon.engines.facts import Facts

Severity = Literal["loads", "warns", "refuses", "silent-garbage"]
Source = Literal["tested", "read", "not known"]
Device = Literal["gpu", "cpu"]

SEVERITIES: Final[tuple[Severity, ...]] = ("loads", "warns", "refuses", "silent-garbage")
"""From best to worst: a checkpoint that loads and answers nonsense is worse than one that does not load."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What an engine will do with (a part of) the checkpoint, and why.

    ``subject``: the modules in question, their numbers masked, or ``checkpoint``. ``source``: ``tested`` if the engine was
    seen to do so, ``read`` if its source says so; ``not known`` where rules found nothing against a class that nobody asked.
    """

    engine: str
    severity: Severity
    tp: int
    subject: str
    reason: str
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a checkpoint is to be served.

    ``tp``: ranks of tensor parallelism. ``version``: of the engine; None is the one whose source the rules were read
    from. ``device``: ``gpu`` is an NVIDIA one.
    """

    engine: str
    tp: int = 1
    version: tuple[int, ...] | None = None
    device: Device = "gpu"

    def is_before(self, *version: int) -> bool:
        """Whether an older engine than ``version`` was named."""
        return self.version is not None and self.version < version


class Finding(NamedTuple):
    """One rule's objection, without what every objection of a judgement shares."""

    severity: Severity
    subject: str
    reason: str
    source: Source = "read"


METHODS: Final = frozenset({"auto-round", "awq", "compressed-tensors", "fp8", "gptq", "quark"})
"""The ``quant_method`` values that the three loaders know and that rules here were read for."""

Rule = Callable[[Facts, Target], Iterator[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One loader: its rules, the version they were read from, and the tensor-parallel sizes worth asking about.

    ``verdict`` is what it says of a checkpoint to which no rule objects.
    """

    name: str
    version: str
    tp_sizes: tuple[int, ...]
    devices: tuple[Device, ...]
    rules: tuple[Rule, ...]
    verdict: Callable[[Facts, Target], Finding]

    def judge(self, facts: Facts, target: Target) -> list[Advice]:
        """All advice for one target, the worst first; a single ``loads`` if nothing stands against it.

        Of several layouts in one checkpoint each is judged, and experts must not be cut between them.
        """
        judged = facts.parts or (facts,)
        findings = list(dict.fromkeys(f for part in judged for rule in self.rules for f in rule(part, target)))
        for part in judged:
            if part.format is not None and part.format.quant_method not in METHODS:
                reason = f"quant_method {part.format.quant_method!r} ({part.layout}) is none that {self.name} is known to read"
                findings.append(Finding("refuses", "checkpoint", reason))
        for name, count in Counter(name for part in facts.parts for name in part.quantized_experts).items():
            if count > 1:
                findings.append(Finding("refuses", name, "in several layouts, but all experts of a layer are one kernel"))
        if facts.unreadable is None and not any(f.severity in ("refuses", "silent-garbage") for f in findings):
            findings.append(self.verdict(facts, target))
        findings.sort(key=lambda f: -SEVERITIES.index(f.severity))
        return [Advice(self.name, f.severity, target.tp, f.subject, f.reason, f.source) for f in findings]


def loads(advice: Iterable[Advice]) -> bool:
    """Whether an engine will load the checkpoint and mean it, as far as that could be judged."""
    return any(a.severity == "loads" for a in advice)

"""Ask engines about a plan: advice for a reader, and requirements that stop a run which would be in vain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final, NamedTuple

from tensorsurgeon.engines.base import Advice, Device, Target, loads
from tensorsurgeon.engines.facts import Facts, facts_of
from tensorsurgeon.engines.registry import ENGINES, engine_named
from tensorsurgeon.errors import EngineError, RecipeError, did_you_mean
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.report import document

KEYS: Final = ("tp", "version", "device")
_NUMBER: Final = re.compile(r"\d+")


class EngineAdvice(NamedTuple):
    """All that one engine says: for which tensor-parallel sizes it loads the checkpoint, and every finding."""

    engine: str
    version: str
    asked_tp: tuple[int, ...]
    loads_at_tp: tuple[int, ...]
    advice: tuple[Advice, ...]


def advise(plan: Plan, engine: str, tp: int, *, version: tuple[int, ...] | None = None, device: Device = "gpu") -> list[Advice]:
    """What one engine will do with the checkpoint at one tensor-parallel size, the worst first.

    One ``loads`` for the whole checkpoint is among them if nothing stands against it.
    """
    target = Target(engine=engine, tp=tp, version=version, device=device)
    return engine_named(engine).judge(facts_of(plan), target)


def advise_all(plan: Plan) -> list[EngineAdvice]:
    """Every engine at every tensor-parallel size it is commonly served with."""
    facts = facts_of(plan)
    return [_ask(facts, name) for name in ENGINES]


def _ask(facts: Facts, name: str) -> EngineAdvice:
    engine = engine_named(name)
    answers = {tp: engine.judge(facts, Target(engine=name, tp=tp)) for tp in engine.tp_sizes}
    good = tuple(tp for tp, advice in answers.items() if loads(advice))
    return EngineAdvice(name, engine.version, engine.tp_sizes, good, tuple(a for advice in answers.values() for a in advice))


def check_requirements(plan: Plan, requirements: Sequence[str]) -> None:
    """EngineError with every reason if an engine that is required would refuse the checkpoint or misread it.

    A requirement is ``vllm``, ``vllm:tp=4`` or ``vllm:tp=4,version=0.21,device=cpu``; RecipeError if it is none.
    """
    targets = [(text, parse_requirement(text)) for text in requirements]
    if not targets:
        return
    facts = facts_of(plan)
    refusals = []
    for text, target in targets:
        advice = engine_named(target.engine).judge(facts, target)
        # Without a verdict (a quantization that no format here reads) the warnings say why there is none.
        worst = [a for a in advice if a.severity in ("refuses", "silent-garbage")] or advice
        if not loads(advice):
            refusals += [f"{text}: {a.severity}: {a.subject}: {a.reason} [{a.source}]" for a in worst]
    if refusals:
        raise EngineError("the engines required would not serve this checkpoint:\n  " + "\n  ".join(refusals))


def parse_requirement(text: str) -> Target:
    """``ENGINE[:KEY=VALUE[,KEY=VALUE]]`` with the keys tp, version and device; RecipeError for anything else."""
    name, _, rest = text.partition(":")
    engine = engine_named(name)
    given: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        if not equals or key not in KEYS:
            raise RecipeError(f"engine {text}: {key!r} is none of its keys{did_you_mean(key, KEYS)} (as vllm:tp=4,version=0.32)")
        given[key] = _value(text, key, value, engine.devices)
    return Target(engine=name, **given)


def _value(text: str, key: str, value: str, devices: Sequence[str]) -> Any:
    if key == "device":
        if value not in devices:
            raise RecipeError(f"engine {text}: device must be {' or '.join(devices)}, found {value!r}")
        return value
    parts = value.split(".")
    if not all(part.isdecimal() for part in parts) or (key == "tp" and (len(parts) > 1 or int(value) < 1)):
        raise RecipeError(f"engine {text}: {key} must be {'a positive number' if key == 'tp' else 'as 0.32'}, found {value!r}")
    return int(value) if key == "tp" else tuple(map(int, parts))


def advice_as_data(everything: Sequence[EngineAdvice]) -> list[dict[str, Any]]:
    """The advice as plain data."""
    return [
        {
            "engine": one.engine,
            "version": one.version,
            "asked_tp": list(one.asked_tp),
            "loads_at_tp": list(one.loads_at_tp),
            "advice": [asdict(a) for a in one.advice],
        }
        for one in everything
    ]


def advice_as_text(everything: Sequence[EngineAdvice]) -> str:
    """The advice for a reader: one line per engine, and one per finding, sizes with the same finding together."""
    lines = ["engines (nothing was loaded; by rules that were tested or read in their source):"]
    for one in everything:
        lines.append(f"  {one.engine} {one.version}: {_summary(one)}")
        # The same finding at several sizes differs in its figures; those of the first size stand for all.
        findings: dict[tuple[str, str, str], list[Advice]] = {}
        for a in one.advice:
            if a.severity != "loads":
                findings.setdefault((a.severity, a.subject, _NUMBER.sub("", a.reason)), []).append(a)
        for same in findings.values():
            first = same[0]
            at = "" if len(same) == len(one.asked_tp) else f" at tp {_listed([a.tp for a in same])}"
            lines.append(f"    {first.severity}{at}: {first.subject}: {first.reason} [{first.source}]")
    return document(lines)


def _summary(one: EngineAdvice) -> str:
    only = one.asked_tp == (1,)
    if one.loads_at_tp:
        source = next(a.source for a in one.advice if a.severity == "loads" and a.tp == one.loads_at_tp[0])
        where = "" if only else f" at tp {_listed(one.loads_at_tp)}"
        words = "no rule speaks against it" if source == "not known" else "loads"
        return f"{words}{where} [{source}]"
    if not any(a.severity in ("refuses", "silent-garbage") for a in one.advice):
        return "not judged"
    worst = "loads, but answers nonsense" if any(a.severity == "silent-garbage" for a in one.advice) else "refuses"
    return worst if only else f"{worst} at every tp asked ({_listed(one.asked_tp)})"


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))

"""Whether a loader finds experts that are stored one by one, by the names that they have on disk.

vLLM's loaders look for each matrix of an expert by name and pass over what they do not look for: the model is served, and its
experts are whatever lay in memory. gpt-oss and Granite were (``tests/engines/test_vllm_families.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorsurgeon.engines.base import Finding, Target
from tensorsurgeon.engines.facts import Facts
from tensorsurgeon.models.asked.answers import stacks_wanted
from tensorsurgeon.models.describe import masked


def experts_nobody_looks_for(facts: Facts, target: Target) -> Iterator[Finding]:
    """vLLM: by what its class, or the family's table, says of experts one by one."""
    answer, family = facts.model.answer, facts.model.family
    why = None if family is None else dict(family.unread_experts).get(target.engine)
    if why is not None:
        for subject in one_by_one(facts):
            yield Finding("silent-garbage", subject, why, "tested")
        return
    for experts in facts.experts:
        if not experts.is_mtp and answer is not None and answer.experts:
            found = {answer.renamed(f".{leaf}.").strip(".") for leaf in experts.leaves}
            if unread := sorted(found - answer.experts):
                reason = (
                    f"{', '.join(unread)} one by one; its loader looks for {', '.join(sorted(answer.experts))} and passes over"
                )
                yield Finding("silent-garbage", experts.subject, f"{reason} the rest without a word")


def experts_not_gathered(facts: Facts, target: Target) -> Iterator[Finding]:
    """transformers: classes that hold the experts of a layer in one tensor and gather none that are stored one by one."""
    if stacks_wanted(facts.config) is None:
        return
    for subject in one_by_one(facts) if facts.layout not in ("gptq", "awq") else ():
        reason = "its class holds the experts of a layer in one tensor and gathers none: they stay as they were initialised"
        yield Finding("silent-garbage", subject, reason)


def one_by_one(facts: Facts) -> tuple[str, ...]:
    """The main model's lists of experts that are stored one by one, quantized or not, numbers masked."""
    lists = (name for name in (*facts.quantized_experts, *facts.split) if not facts.model.is_mtp(name))
    return tuple(dict.fromkeys(map(masked, lists)))

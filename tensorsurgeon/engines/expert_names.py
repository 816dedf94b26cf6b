"""Whether a loader finds quantized experts that are stored one by one, by the names that they have on disk.

vLLM's loaders look for each matrix of an expert by name and pass over what they do not look for: the model is served, and its
experts are whatever lay in memory. gpt-oss and Granite were (``tests/engines/test_vllm_families.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorsurgeon.engines.base import Finding, Target
from tensorsurgeon.engines.facts import Facts
from tensorsurgeon.models.asked.answers import stacks_wanted


def experts_nobody_looks_for(facts: Facts, target: Target) -> Iterator[Finding]:
    """vLLM: by what its class, or the family's table, says of experts one by one."""
    answer, family = facts.model.answer, facts.model.family
    why = None if family is None else dict(family.unread_experts).get(target.engine)
    for experts in facts.experts:
        if experts.is_mtp:
            continue
        if why is not None:
            yield Finding("silent-garbage", experts.subject, why, "tested")
        elif answer is not None and answer.experts:
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
    for experts in facts.experts:
        if not experts.is_mtp and facts.layout not in ("gptq", "awq"):
            reason = "its class holds the experts of a layer in one tensor and gathers none: they stay as they were initialised"
            yield Finding("silent-garbage", experts.subject, reason)

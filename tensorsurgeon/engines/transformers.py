"""What transformers loads: tried with 5.17 to 5.23 on the tiny model, by loading and by the perplexity that came out.

Since 5.0 its mixture-of-experts classes hold the experts of a layer in one tensor, and gather them from a checkpoint
that has them one by one. Where that gathering does not know a layout, it may leave the experts as they were
initialised, or take codes for weights, and say no more than a report of unexpected keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tensorsurgeon.engines.base import Engine, Finding, Target
from tensorsurgeon.engines.evidence import evidence
from tensorsurgeon.engines.expert_names import experts_not_gathered
from tensorsurgeon.engines.facts import Facts
from tensorsurgeon.engines.parallel import experts_of_one_kind, stacked_experts, unreadable_config

LIBRARIES: Final = {
    "compressed-tensors": "compressed-tensors",
    "quark": "amd-quark",
    "gptq": "optimum and gptqmodel",
    "awq": "gptqmodel",
    "auto-round": "auto-round",
    "fp8": "accelerate",
}
"""What must be installed besides, or loading is an ImportError."""

# Loaded with the right perplexity while experts were stored one by one (engines.md).
_SEEN: Final = {"ct-packed", "ct-float", "ct-mxfp4", "autoround", "hf-fp8"}


def split_experts(facts: Facts, target: Target) -> Iterator[Finding]:
    """Quantized experts stored one by one: which layouts are gathered, which fail, and which fail without a word."""
    if not facts.experts:
        return
    experts = facts.experts[0]
    subject, layout = experts.subject, facts.layout
    if layout == "ct-nvfp4":
        reason = "experts load without their global scales: every weight is wrong by orders of magnitude"
        yield Finding("silent-garbage", subject, reason, "tested")
    elif layout == "quark-int8":
        reason = "experts load as raw INT8 codes without their scales"
        yield Finding("silent-garbage", subject, reason, "tested")
    elif layout in ("gptq", "awq"):
        reason = "only nn.Linear is replaced, and this architecture's experts are one tensor: their words have no place"
        yield Finding("silent-garbage", subject, reason)
    elif layout == "quark-int4":
        yield Finding("refuses", subject, "packed experts do not fit the stacked tensor (mismatched sizes)", "tested")
    elif layout == "ct-packed" and not experts.scheme.symmetric:
        yield Finding("refuses", subject, "experts with zero points cannot be gathered (conversion error)", "tested")
    elif layout == "ct-float" and any(f.scheme.block for f in facts.experts):
        rows, columns = experts.scheme.block or (0, 0)
        if any(n > rows or k > columns for n, k, _ in experts.leaves.values()):
            yield Finding("refuses", subject, "the scales of FP8 blocks are not expanded while experts are gathered", "tested")
    elif layout not in _SEEN and layout != "ct-int":
        yield Finding("warns", subject, "not known whether experts of this layout are gathered right; compare a few logits")


def int8_beside_split_experts(facts: Facts, target: Target) -> Iterator[Finding]:
    """INT8 of compressed-tensors fails as soon as any expert is stored one by one, even in BF16."""
    experts = next((m for m in (*facts.quantized_experts, *facts.split) if not facts.model.is_mtp(m)), None)
    if facts.layout == "ct-int" and experts is not None:
        reason = "INT8 does not load where experts are stored one by one, quantized or not (conversion error)"
        yield Finding("refuses", experts, reason, "tested")


def libraries(facts: Facts, target: Target) -> Iterator[Finding]:
    """Every method needs its publisher's library."""
    needed = LIBRARIES.get(str(facts.settings.get("quant_method")))
    if facts.layout and needed is not None:
        yield Finding("warns", "checkpoint", f"needs {needed}, or loading is an ImportError")


def single_process(facts: Facts, target: Target) -> Iterator[Finding]:
    """How it shards quantized weights was neither read nor tried."""
    if target.tp > 1:
        yield Finding("warns", "checkpoint", "tensor parallelism of transformers was not looked at")


def verdict(facts: Facts, target: Target) -> Finding:
    """It loads, as far as that is known."""
    return Finding("loads", "checkpoint", facts.described(), evidence("transformers", facts))


TRANSFORMERS: Final = Engine(
    name="transformers",
    version="5.23",
    tp_sizes=(1,),
    devices=("gpu", "cpu"),
    rules=(
        unreadable_config,
        experts_of_one_kind,
        stacked_experts,
        split_experts,
        experts_not_gathered,
        int8_beside_split_experts,
        libraries,
        single_process,
    ),
    verdict=verdict,
)

"""What SGLang loads: read in the source of 0.5.23 and of its public repository; SGLang does not run on this machine.

Its loaders share vLLM's ancestors and differ in what was added since: Marlin is never padded, Quark's integers are
unknown, GPTQ's experts know no exceptions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tensorsurgeon.engines.base import Engine, Finding, Target
from tensorsurgeon.engines.evidence import evidence
from tensorsurgeon.engines.facts import Facts
from tensorsurgeon.engines.parallel import MARLIN_GROUPS, RULES, WORDS
from tensorsurgeon.engines.vllm import TILE_INPUTS, TILE_OUTPUTS
from tensorsurgeon.models.fused import describe
from tensorsurgeon.models.mtp import named_apart

PACKINGS: Final = ("auto_round:auto_gptq", "auto_round:auto_awq")


def quark_kinds(facts: Facts, target: Target) -> Iterator[Finding]:
    """Of Quark's schemes it has FP8 and MXFP4 only."""
    if facts.layout in ("quark-int8", "quark-int4"):
        yield Finding("refuses", "checkpoint", f"no scheme for {facts.described()}: of AMD Quark it reads FP8 and MXFP4 only")


def compressed_kinds(facts: Facts, target: Target) -> Iterator[Finding]:
    """Packed integers of 4 and 8 bits; experts symmetric, their groups whole on a rank."""
    if facts.layout != "ct-packed":
        return
    for form in facts.forms:
        if form.scheme.num_bits not in (4, 8):
            yield Finding("refuses", form.subject, f"{form.scheme.num_bits} bits; packed integers are read with 4 or 8")
    for experts in facts.experts:
        size, inner = experts.scheme.group_size, experts.intermediate // target.tp
        if not experts.scheme.symmetric:
            yield Finding("refuses", experts.subject, "zero points: only symmetric quantization is supported for MoE")
        if size > 0 and inner % size:
            yield Finding(
                "refuses",
                experts.subject,
                f"{experts.intermediate} features / {target.tp} ranks = {inner}, no multiple of group_size {size}; "
                f"serve with tp {experts.intermediate // size} or fewer",
            )


def gptq_kinds(facts: Facts, target: Target) -> Iterator[Finding]:
    """Experts go through gptq_marlin or not at all: plain GPTQ refuses them, and no rule can leave them out."""
    if facts.layout != "gptq":
        return
    marlin = all(f.scheme.num_bits in (4, 8) and f.scheme.symmetric and f.scheme.group_size in MARLIN_GROUPS for f in facts.forms)
    for experts in facts.experts:
        inner, size = experts.intermediate // target.tp, experts.scheme.group_size
        if not marlin:
            reason = "plain GPTQ does not support MoE, and gptq_marlin takes 4 or 8 bits, symmetric"
            yield Finding("refuses", experts.subject, reason)
        elif size > 0 and inner % size:
            reason = f"{experts.intermediate} features / {target.tp} ranks = {inner}, no multiple of group_size {size}"
            yield Finding("refuses", experts.subject, reason)
    for form in facts.linears:
        if form.scheme.num_bits not in (2, 3, 4, 8):
            yield Finding("refuses", form.subject, f"{describe(form.scheme)}; GPTQ is read with 2, 3, 4 or 8 bits")
    main = [module for module in facts.float_experts if not facts.model.is_mtp(module)]
    if main:
        reason = "experts ignore the rules in dynamic: these are built quantized, and their BF16 tensors skipped"
        yield Finding("silent-garbage", main[0], reason)
    elif any(facts.model.is_mtp(module) for module in facts.float_experts):
        reason = "the MTP head's experts ignore dynamic and are built quantized: its BF16 experts may be skipped, drafts fail"
        yield Finding("warns", "mtp", reason)


def autoround_kinds(facts: Facts, target: Target) -> Iterator[Finding]:
    """Its two packings; experts only where Marlin's check passes."""
    if facts.layout != "autoround":
        return
    packing = facts.settings.get("packing_format")
    if packing is not None and packing not in PACKINGS:
        yield Finding("refuses", "checkpoint", f"packing_format {packing!r}; {' and '.join(PACKINGS)} are read only")
    for experts in facts.experts:
        scheme, inner = experts.scheme, experts.intermediate // target.tp
        takes = scheme.num_bits in (4, 8) and scheme.symmetric and scheme.group_size in MARLIN_GROUPS
        if packing == PACKINGS[1]:
            continue
        if not takes:
            yield Finding("refuses", experts.subject, f"{describe(scheme)}; experts of auto_round:auto_gptq must suit Marlin")
        elif experts.hidden % TILE_INPUTS or inner % max(TILE_OUTPUTS, scheme.group_size):
            yield Finding(
                "refuses",
                experts.subject,
                f"{experts.intermediate} features / {target.tp} ranks = {inner}: does not suit Marlin with group_size "
                f"{scheme.group_size}, and nothing else takes them",
            )


def marlin_tiles(facts: Facts, target: Target) -> Iterator[Finding]:
    """Marlin's tiles are 64 outputs by 128 inputs, or 128 by 64, never padded; AWQ has other kernels to fall back to.

    The loader computes whether a shape suits and does not look at the answer, so that the kernel decides.
    """
    if facts.layout not in WORDS - {"quark-int4"}:
        return
    for linear in facts.linears:
        outputs, inputs = sum(linear.outputs(target.tp, facts.heads)), linear.inputs(target.tp)
        shape = f"{outputs} x {inputs} per rank is no multiple of Marlin's {TILE_OUTPUTS} x {TILE_INPUTS}"
        if not outputs % TILE_OUTPUTS and not inputs % TILE_INPUTS:
            continue
        if facts.layout == "awq":
            yield Finding("warns", linear.subject, f"{shape}: AWQ's own kernel, which is slower")
        elif outputs % TILE_INPUTS or inputs % TILE_OUTPUTS:
            yield Finding("refuses", linear.subject, f"{shape}, and SGLang does not pad")


def mixed_storage(facts: Facts, target: Target) -> Iterator[Finding]:
    """One stacked expert list switches the loader over, and whatever is stored one by one after it is skipped."""
    both = facts.stored_both_ways()
    if both is not None:
        reason = f"stacked, while {both[1]} is stored one by one: after the first stacked list the loader skips the others"
        yield Finding("silent-garbage", both[0], reason)


def expert_blocks(facts: Facts, target: Target) -> Iterator[Finding]:
    """Blocks of FP8 experts must be whole on a rank."""
    for experts in facts.experts:
        inner, block = experts.intermediate // target.tp, experts.scheme.block
        if block is not None and (inner % block[0] or (target.tp > 1 and inner % block[1])):
            reason = f"{experts.intermediate} features / {target.tp} ranks = {inner} cuts blocks of {block[0]}"
            yield Finding("refuses", experts.subject, reason)


def quark_mtp(facts: Facts, target: Target) -> Iterator[Finding]:
    """For Quark it looks for a plain name that starts with ``mtp.``; vLLM wants an expression: give both."""
    if facts.layout == "quark-fp8" and facts.float_mtp:
        named = any(named_apart(entry) for entry in facts.settings.get("exclude") or ())
        if not named:
            reason = "exclude has no plain name of the MTP head's: it is built quantized and does not load"
            yield Finding("warns", "mtp", reason)


def verdict(facts: Facts, target: Target) -> Finding:
    """It loads, as far as reading tells."""
    return Finding("loads", "checkpoint", facts.described(), evidence("sglang", facts))


SGLANG: Final = Engine(
    name="sglang",
    version="0.5.23",
    tp_sizes=(1, 2, 4, 8),
    devices=("gpu",),
    rules=(
        *RULES,
        quark_kinds,
        compressed_kinds,
        gptq_kinds,
        autoround_kinds,
        marlin_tiles,
        mixed_storage,
        expert_blocks,
        quark_mtp,
    ),
    verdict=verdict,
)

"""What vLLM loads: read in the source of 0.32 (the CPU build, whose loaders are those of the GPU), and tried with it.

The kernels of GPUs could not be run here; what is said of them is their ``can_implement``. Where the ground-truth
document differs the source is followed: Marlin pads what is too narrow since some version after 0.21, and experts of
GPTQ, AWQ, AutoRound and Quark whose groups straddle ranks fall back to kernels that repeat the scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Final

from tensorsurgeon.engines.base import Engine, Finding, Target
from tensorsurgeon.engines.evidence import evidence
from tensorsurgeon.engines.expert_names import experts_nobody_looks_for
from tensorsurgeon.engines.facts import Facts
from tensorsurgeon.engines.mtp import mtp_left_alone
from tensorsurgeon.engines.parallel import MARLIN_GROUPS, RULES, WORDS, ranks_of
from tensorsurgeon.engines.sharding import Experts
from tensorsurgeon.models.fused import describe

# The engine's own constants (marlin_utils.py): the narrowest tile, and the smallest group it halves to.
TILE_OUTPUTS, TILE_INPUTS = 64, 128
SMALLEST_GROUP: Final = 32
PADS_SINCE: Final = (0, 32)
PACKINGS: Final = ("auto_round:auto_gptq", "auto_round:auto_awq")


def activation_order(facts: Facts, target: Target) -> Iterator[Finding]:
    """Group activation ordering has been removed, and every ``g_idx`` is dropped."""
    settings = facts.settings
    overridden = any(isinstance(v, dict) and v.get("desc_act") for v in (settings.get("dynamic") or {}).values())
    if (settings.get("desc_act") and settings.get("group_size") != -1) or overridden:
        yield Finding("refuses", "checkpoint", "desc_act is true: group activation ordering is no longer supported")
    for group in (settings.get("config_groups") or {}).values():
        if (group.get("weights") or {}).get("actorder") in ("group", "dynamic"):
            yield Finding("refuses", "checkpoint", "actorder is group: group activation ordering is no longer supported")


def integer_kinds(facts: Facts, target: Target) -> Iterator[Finding]:
    """Which widths, zero points and groups the integer kernels take."""
    layout = facts.layout
    packing = facts.settings.get("packing_format")
    if layout == "autoround" and packing is not None and packing not in PACKINGS:
        yield Finding("refuses", "checkpoint", f"packing_format {packing!r}; integers are read as {' and '.join(PACKINGS)}")
        return
    is_gptq = layout == "gptq" or (layout == "autoround" and packing != PACKINGS[1])
    forms = [(f.subject, f.scheme, False) for f in facts.linears] + [(f.subject, f.scheme, True) for f in facts.experts]
    for subject, scheme, is_experts in forms if layout in WORDS else ():
        bits, size, symmetric = scheme.num_bits, scheme.group_size, scheme.symmetric
        kind = describe(scheme)
        if layout == "gptq" and (bits not in (4, 8) or not symmetric):
            yield Finding("refuses", subject, f"{kind}; GPTQ is read symmetric with 4 or 8 bits only")
        elif layout == "autoround" and is_gptq and bits in (4, 8) and not symmetric and not is_experts:
            yield Finding("refuses", subject, f"{kind}; linears of auto_round:auto_gptq are read symmetric only")
        elif is_gptq and bits in (4, 8) and size not in MARLIN_GROUPS and not is_experts:
            yield Finding("refuses", subject, f"group_size {size}; Marlin takes {', '.join(map(str, MARLIN_GROUPS))}")
        elif layout == "quark-int4" and size == -1:
            yield Finding("refuses", subject, f"{kind}; Quark int4 is read in groups only, with a positive group_size")
        elif bits not in (4, 8):
            yield Finding("warns", subject, f"{bits} bits: no kernel but humming's takes them, on NVIDIA, where it is installed")
        elif bits == 8 and not symmetric:
            yield Finding("warns", subject, "8 bits with zero points: Machete (Hopper) or humming only")
        elif size not in MARLIN_GROUPS and not is_experts:
            yield Finding("warns", subject, f"group_size {size} is none of Marlin's: a slower kernel, or none")
    if layout in ("ct-int", "quark-int8"):
        for subject, scheme, _ in forms:
            if not scheme.symmetric or scheme.group_size != -1:
                yield Finding("refuses", subject, f"{describe(scheme)}; W8A8 is read symmetric with one scale per output only")


def marlin_tiles(facts: Facts, target: Target) -> Iterator[Finding]:
    """Marlin's tiles are 64 outputs by 128 inputs, or 128 by 64; what is narrower is padded, or refused by older ones."""
    if facts.layout not in WORDS or target.device != "gpu":
        return
    pads = not target.is_before(*PADS_SINCE)
    for linear in facts.linears:
        tp = ranks_of(linear, facts, target)
        outputs, inputs = sum(linear.outputs(tp, facts.heads)), linear.inputs(tp)
        if not outputs % TILE_OUTPUTS and not inputs % TILE_INPUTS:
            continue
        if pads and not outputs % TILE_INPUTS and not inputs % TILE_OUTPUTS:
            continue
        shape = f"{outputs} x {inputs} per rank is no multiple of Marlin's {TILE_OUTPUTS} x {TILE_INPUTS}"
        if pads:
            yield Finding("warns", linear.subject, f"{shape}: padded on every forward, which is slower")
        else:
            yield Finding("refuses", linear.subject, f"{shape}; vLLM 0.21 does not pad, 0.32 does")


def packed_experts(facts: Facts, target: Target) -> Iterator[Finding]:
    """Experts of packed integers: which kernel is found for the size that one rank holds."""
    if facts.layout not in WORDS or target.device != "gpu":
        return
    for experts in facts.experts:
        inner, size = experts.intermediate // target.tp, experts.scheme.group_size
        share = f"{experts.intermediate} features / {target.tp} ranks = {inner}"
        if facts.layout == "ct-packed":
            yield from _compressed_experts(experts, target, inner, share)
            continue
        # AutoRound's own check leaves out the padding that the others ask for.
        narrowest = max(64, size) if facts.layout == "autoround" else max(1, size)
        fits = not experts.hidden % TILE_INPUTS and not inner % narrowest and size in MARLIN_GROUPS
        if fits and facts.layout != "quark-int4":
            continue
        if size == -1:
            if facts.layout != "quark-int4":
                yield Finding("refuses", experts.subject, f"{share}: no Marlin tile fits, and moe_wna16 takes no channel scales")
            continue
        smaller = size
        while smaller >= SMALLEST_GROUP and (inner % smaller or experts.hidden % smaller):
            smaller //= 2
        if smaller < SMALLEST_GROUP:
            yield Finding(
                "refuses", experts.subject, f"{share}: no group_size of {SMALLEST_GROUP} or more that divides {size} divides it"
            )
        elif facts.layout != "quark-int4" or smaller < size:
            scales = f", each scale repeated for groups of {smaller}" if smaller < size else ""
            yield Finding("warns", experts.subject, f"{share} suits no Marlin tile: falls back to moe_wna16 kernels{scales}")


def _compressed_experts(experts: Experts, target: Target, inner: int, share: str) -> Iterator[Finding]:
    scheme, size = experts.scheme, experts.scheme.group_size
    if not scheme.symmetric and target.is_before(*PADS_SINCE):
        yield Finding("refuses", experts.subject, "zero points; vLLM 0.21 reads symmetric experts only, 0.32 reads both")
    if size > 0 and (experts.hidden % size or inner % size):
        yield Finding(
            "refuses",
            experts.subject,
            f"{share}, no multiple of group_size {size}; serve with tp {experts.intermediate // size} or fewer, or with "
            "expert parallelism",
        )
        return
    marlin = not experts.hidden % TILE_INPUTS and size in MARLIN_GROUPS
    if not marlin and size == -1:
        reason = f"hidden size {experts.hidden}: no Marlin tile, and no other kernel takes channel scales"
        yield Finding("refuses", experts.subject, reason)
    elif not marlin:
        yield Finding("warns", experts.subject, f"hidden size {experts.hidden}, group_size {size}: Triton's kernel, not Marlin's")
    elif inner % 64:
        yield Finding("warns", experts.subject, f"{share}, no multiple of 64: padded for Marlin, which is slower")
    if not scheme.symmetric and 2 * inner * scheme.num_bits % 32:
        yield Finding("refuses", experts.subject, f"{share}: the zero points of 2 x {inner} outputs do not fill words")


def float_experts(facts: Facts, target: Target) -> Iterator[Finding]:
    """FP8 experts: blocks that one rank can hold, and activations that the kernels quantize."""
    if facts.layout == "ct-float":
        groups = (facts.settings.get("config_groups") or {}).values()
        if facts.experts and any(group.get("input_activations") is None for group in groups):
            yield Finding("refuses", facts.experts[0].subject, "FP8 experts need quantized activations; say activations: dynamic")
    for experts in facts.experts if facts.layout in ("ct-float", "hf-fp8") else ():
        block = experts.scheme.block
        inner = experts.intermediate // target.tp
        if block is None or not (inner % block[0] or (target.tp > 1 and inner % block[1])):
            continue
        share = f"{experts.intermediate} features / {target.tp} ranks = {inner}"
        finer = gcd(*block, inner, experts.hidden)
        if facts.layout == "hf-fp8" and finer >= SMALLEST_GROUP and not target.is_before(*PADS_SINCE):
            reason = f"{share} cuts blocks of {block[0]}: scales repeated for blocks of {finer}, Triton only"
            yield Finding("warns", experts.subject, reason)
        else:
            yield Finding("refuses", experts.subject, f"{share} cuts blocks of {block[0]}")


def awq_substrings(facts: Facts, target: Target) -> Iterator[Finding]:
    """``modules_to_not_convert`` are substrings, looked for in the engine's own names too."""
    if facts.layout != "awq":
        return
    names = facts.names_in_engines()
    for entry in facts.settings.get("modules_to_not_convert") or ():
        hit = next((name for name in names if entry in name), None)
        if hit is not None:
            reason = f"modules_to_not_convert has {entry!r}, part of the name of this quantized module: its words have no place"
            yield Finding("refuses", hit, reason)


def mixed_storage(facts: Facts, target: Target) -> Iterator[Finding]:
    """One stacked expert list switches older loaders over for all that follow."""
    both = facts.stored_both_ways()
    if both is not None and target.is_before(*PADS_SINCE):
        reason = f"stacked, while {both[1]} is stored one by one: vLLM 0.21 reads only one way"
        yield Finding("silent-garbage", both[0], reason)


def cpu_kernels(facts: Facts, target: Target) -> Iterator[Finding]:
    """What the CPU build has no kernel for; it says nothing against the file."""
    if target.device != "cpu":
        return
    layout, experts = facts.layout, facts.experts
    eight = next((f.subject for f in facts.forms if f.scheme.num_bits != 4), None)
    if layout in WORDS and eight is not None:
        yield Finding("refuses", eight, "no kernel on CPUs but for packed integers of 4 bits; GPUs have one", "tested")
    if layout == "autoround" and experts:
        yield Finding("refuses", experts[0].subject, "no AutoRound experts on CPUs; GPUs have them", "tested")
    if layout in ("quark-int4", "awq") and experts:
        yield Finding("refuses", experts[0].subject, "no WNA16 experts of this layout on CPUs; GPUs have them", "tested")
    if layout in ("ct-packed", "gptq") and experts and (experts[0].scheme.group_size == -1 or not experts[0].scheme.symmetric):
        yield Finding("refuses", experts[0].subject, "experts on CPUs must be symmetric and in groups")
    if any(f.scheme.block for f in facts.forms):
        yield Finding("refuses", "checkpoint", "FP8 blocks need AMX tiles on a CPU (Sapphire Rapids or newer)", "tested")
    if layout == "ct-nvfp4":
        yield Finding("refuses", "checkpoint", "no NVFP4 kernel with BF16 activations on CPUs; GPUs have it", "tested")
    if layout in ("ct-mxfp4", "ct-float", "quark-fp8") and not any(f.scheme.block for f in facts.linears):
        yield Finding("warns", "checkpoint", "not known whether CPUs have a kernel for this layout")


def mtp_head(facts: Facts, target: Target) -> Iterator[Finding]:
    """An unquantized MTP head must be named where the MTP model, which has its own names, looks."""
    why = mtp_left_alone(facts)
    if why is not None:
        yield Finding("warns", "mtp", f"{why}: the model loads, but its MTP head does not (speculative decoding)")


def verdict(facts: Facts, target: Target) -> Finding:
    """It loads; seen on one rank and with symmetric int4 only, of packed integers."""
    source = evidence("vllm", facts)
    int4 = all(f.scheme.num_bits == 4 and f.scheme.symmetric for f in facts.forms)
    if source == "tested" and (target.tp > 1 or (facts.layout == "ct-packed" and not int4)):
        source = "read"
    return Finding("loads", "checkpoint", facts.described(), source)


VLLM: Final = Engine(
    name="vllm",
    version="0.32",
    tp_sizes=(1, 2, 4, 8),
    devices=("gpu", "cpu"),
    rules=(
        *RULES,
        activation_order,
        integer_kinds,
        marlin_tiles,
        packed_experts,
        experts_nobody_looks_for,
        float_experts,
        awq_substrings,
        mixed_storage,
        cpu_kernels,
        mtp_head,
    ),
    verdict=verdict,
)

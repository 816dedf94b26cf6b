"""Rules that vLLM and SGLang share: what ranks can share, what one kernel per layer needs, where no config reaches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tensorsurgeon.engines.base import Finding, Target
from tensorsurgeon.engines.facts import Facts
from tensorsurgeon.engines.sharding import Linear
from tensorsurgeon.models.fused import describe
from tensorsurgeon.models.roles import WITHOUT_CONFIG, Role

WORDS: Final = {"ct-packed", "gptq", "autoround", "awq", "quark-int4"}
"""Layouts of integers packed into words, read with BF16 activations (WNA16)."""

GROUPED: Final = WORDS | {"ct-nvfp4", "ct-mxfp4"}
MARLIN_GROUPS: Final = (-1, 32, 64, 128)


def ranks_of(linear: Linear, facts: Facts, target: Target) -> int:
    """Among how many ranks an engine cuts a linear.

    vLLM keeps the gates of linear attention whole on every NVIDIA rank under GPTQ, AWQ and AutoRound, for they are narrower
    than Marlin's tile (qwen_gdn_linear_attn.py, maybe_disable_tp), and cuts them under every other layout.
    """
    whole = linear.kind is Role.LINEAR_ATTENTION_GATE and facts.layout in ("gptq", "awq", "autoround")
    return 1 if whole and target.engine == "vllm" and target.device == "gpu" else target.tp


def unreadable_config(facts: Facts, target: Target) -> Iterator[Finding]:
    """A quantization that no format here reads cannot be judged."""
    if facts.unreadable is not None:
        yield Finding("warns", "checkpoint", f"not judged, for its quantization could not be read: {facts.unreadable}")


def heads_among_ranks(facts: Facts, target: Target) -> Iterator[Finding]:
    """Attention heads are whole on a rank; keys and values are repeated where they are fewer."""
    heads, tp = facts.heads, target.tp
    if heads.attention and heads.attention % tp:
        yield Finding("refuses", "attention", f"{heads.attention} attention heads cannot be shared by {tp} ranks")
    if heads.linear_values_count and heads.linear_values_count % tp:
        yield Finding("refuses", "linear attention", f"{heads.linear_values_count} value heads cannot be shared by {tp} ranks")


def features_among_ranks(facts: Facts, target: Target) -> Iterator[Finding]:
    """Every rank gets as many features as any other."""
    for linear in facts.linears:
        tp = ranks_of(linear, facts, target)
        uneven = linear.uneven(tp, facts.heads)
        if uneven is not None:
            yield Finding("refuses", linear.subject, f"{uneven} cannot be shared by {tp} ranks")
        if tp > 1 and linear.cut == "unknown":
            yield Finding("warns", linear.subject, f"not known how it is cut among {tp} ranks; judged as if it were not")
    for experts in facts.experts:
        if experts.intermediate % target.tp:
            reason = f"{experts.intermediate} features of each expert cannot be shared by {target.tp} ranks"
            yield Finding("refuses", experts.subject, reason)


def groups_among_ranks(facts: Facts, target: Target) -> Iterator[Finding]:
    """A group of inputs has one scale and lies on one rank."""
    if facts.layout not in GROUPED:
        return
    tp = target.tp
    for linear in facts.linears:
        size = linear.scheme.group_size
        inputs = linear.inputs(tp)
        if linear.cut == "inputs" and size > 0 and inputs % size:
            largest = max(n for n in range(1, tp + 1) if tp % n == 0 and linear.in_features // n % size == 0)
            yield Finding(
                "refuses",
                linear.subject,
                f"in_features {linear.in_features} / {tp} ranks = {inputs}, no multiple of group_size {size}; "
                f"serve with tp {largest} or fewer, quantize with a smaller group_size, or leave it unquantized",
            )


def words_among_ranks(facts: Facts, target: Target) -> Iterator[Finding]:
    """A word holds several codes and cannot be divided between ranks."""
    if facts.layout not in WORDS:
        return
    along_outputs = facts.layout in ("awq", "quark-int4") or str(facts.settings.get("packing_format", "")).endswith("awq")
    has_zero_words = facts.layout in ("gptq", "autoround", "awq", "quark-int4")
    for linear in facts.linears:
        bits, tp = linear.scheme.num_bits, ranks_of(linear, facts, target)
        if not along_outputs and linear.cut == "inputs" and tp > 1 and linear.inputs(tp) * bits % 32:
            yield Finding(
                "refuses",
                linear.subject,
                f"in_features {linear.in_features} / {tp} ranks = {linear.inputs(tp)} codes of {bits} bits, which do not fill "
                "words of 32 bits: two ranks would share one",
            )
        if tp > 1 and linear.cut == "outputs" and (has_zero_words or not linear.scheme.symmetric):
            odd = next((rows for rows in linear.outputs(tp, facts.heads) if rows * bits % 32), None)
            if odd is not None:
                what = "codes" if along_outputs else "zero points"
                yield Finding(
                    "refuses", linear.subject, f"{odd} outputs per rank: their {what} of {bits} bits do not fill words of 32 bits"
                )


def experts_of_one_kind(facts: Facts, target: Target) -> Iterator[Finding]:
    """All experts of a layer are one kernel, with one scheme taken from expert 0."""
    for experts in facts.experts:
        if experts.mixed is not None:
            yield Finding(
                "refuses", experts.subject, f"{experts.mixed} within a layer, but all its experts are one kernel with one scheme"
            )


def stacked_experts(facts: Facts, target: Target) -> Iterator[Finding]:
    """No loader reads quantized experts that are one three-dimensional tensor; they must be split."""
    for module in facts.stacked_quantized:
        reason = "experts stacked in one tensor and quantized; engines read quantized experts one by one: split them"
        yield Finding("refuses", module, reason)


def gates_without_config(facts: Facts, target: Target) -> Iterator[Finding]:
    """Routers and shared-expert gates are built without a quantization config, so their scales have no place."""
    for linear in facts.linears:
        if linear.kind in WITHOUT_CONFIG:
            yield Finding(
                "refuses",
                linear.subject,
                f"quantized ({describe(linear.scheme)}), but the engine builds routers and gates unquantized: leave it BF16",
            )


def fp8_blocks(facts: Facts, target: Target) -> Iterator[Finding]:
    """Blocks of FP8 lie on one rank, and in one of the linears that are stacked (``validate_fp8_block_shape``)."""
    if facts.layout not in ("hf-fp8", "ct-float"):
        return
    tp = target.tp
    for linear in facts.linears:
        if linear.scheme.block is None:
            continue
        rows, columns = linear.scheme.block
        inputs, outputs = linear.inputs(tp), linear.outputs(tp, facts.heads)
        if tp > 1 and linear.cut == "inputs" and inputs % columns:
            yield Finding("refuses", linear.subject, f"{inputs} inputs per rank cut a block of {columns}")
        is_cut = tp > 1 and linear.cut == "outputs"
        checked = outputs if is_cut else outputs[:-1]
        odd = next((size for size in checked if size % rows), None)
        if odd is not None:
            where = "per rank" if is_cut else "of a part that others are stacked upon"
            yield Finding("refuses", linear.subject, f"{odd} outputs {where} cut a block of {rows}; leave it unquantized")


RULES: Final = (
    unreadable_config,
    heads_among_ranks,
    features_among_ranks,
    groups_among_ranks,
    words_among_ranks,
    experts_of_one_kind,
    stacked_experts,
    gates_without_config,
    fp8_blocks,
)

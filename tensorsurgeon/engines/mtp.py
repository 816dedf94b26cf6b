"""Whether a config keeps an unquantized MTP head unquantized where vLLM's MTP model looks for it.

The MTP model (speculative decoding) is built from the same config by other code: plain names under ``mtp.`` are dropped
when the main model's names are mapped, so that most dialects must say it by an expression, each in its own place.
"""

from __future__ import annotations

from collections.abc import Iterable

from tensorsurgeon.engines.facts import Facts
from tensorsurgeon.models.experts import expert_list
from tensorsurgeon.models.mtp import MTP_RULE, MTP_WORD, head_expressions, inside_blocks, named_apart
from tensorsurgeon.tensors.expressions import Expression


def mtp_left_alone(facts: Facts) -> str | None:
    """Why the MTP head would be taken for quantized, in words; None if it will not, or if there is none.

    Read in vLLM 0.32: ``qwen3_5_mtp.py`` and each method's own matching.
    """
    if not facts.layout or not facts.float_mtp:
        return None
    settings = facts.settings
    method = settings.get("quant_method")
    if facts.has_quantized_mtp and method not in ("compressed-tensors", "quark"):
        return "one part of the MTP head is quantized and another is not"
    if method == "gptq":
        rules = [key.removeprefix("-:") for key in settings.get("dynamic") or {} if key.startswith("-:")]
        if any(map(named_apart, facts.float_mtp)):
            return None if any(MTP_WORD in rule for rule in rules) else f"dynamic has no rule {MTP_RULE!r}"
        return _unmatched(facts, [f"re:{rule}" for rule in rules], "dynamic has no rule that leaves the MTP head's layer out")
    if method == "compressed-tensors":
        return _unmatched(facts, settings.get("ignore") or (), f"ignore has no expression {_wanted(facts)!r}")
    if method == "quark":
        return _unmatched(facts, settings.get("exclude") or (), f"exclude has no expression {_wanted(facts)!r}")
    if method == "awq":
        left = settings.get("modules_to_not_convert") or ()
        missed = next((name for name in facts.float_mtp if not any(entry in name for entry in left)), None)
        return None if missed is None or not left else f"modules_to_not_convert has no {MTP_WORD!r}"
    if method == "auto-round":
        blocks = settings.get("block_name_to_quantize") or settings.get("to_quant_block_names") or ""
        blocks = blocks.split(",") if isinstance(blocks, str) else blocks
        inside = not any(blocks) or any(map(inside_blocks, blocks))
        return "block_name_to_quantize does not leave it out" if inside else None
    left = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or ()
    missed = next((name for name in facts.float_mtp if name not in left and expert_list(name) not in left), None)
    return None if missed is None or not left else f"modules_to_not_convert lacks {missed}"


def _wanted(facts: Facts) -> str:
    return f"re:{head_expressions(facts.float_mtp)[0]}"


def _unmatched(facts: Facts, entries: Iterable[str], why: str) -> str | None:
    expressions = [Expression.of_config(entry.removeprefix("re:")) for entry in entries if entry.startswith("re:")]
    missed = any(not any(e.match(name) for e in expressions) for name in facts.float_mtp)
    return why if missed else None

"""Whether a config keeps an unquantized MTP head unquantized where vLLM's MTP model looks for it.

The MTP model (speculative decoding) is built from the same config by other code: plain names under ``mtp.`` are dropped
when the main model's names are mapped, so that most dialects must say it by an expression, each in its own place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tensorsurgeon.engines.facts import MTP, Facts


def mtp_left_alone(facts: Facts) -> str | None:
    """Why the MTP head would be taken for quantized, in words; None if it will not, or if there is none.

    Read in vLLM 0.32: ``qwen3_5_mtp.py`` and each method's own matching.
    """
    if not facts.layout or not facts.float_mtp:
        return None
    settings = facts.settings
    if facts.has_quantized_mtp:
        return "one part of the MTP head is quantized and another is not"
    method = settings.get("quant_method")
    if method == "gptq":
        dynamic = settings.get("dynamic") or {}
        named = any(key.startswith("-:") and "mtp" in key for key in dynamic)
        return None if named else "dynamic has no rule '-:.*mtp.*'"
    if method == "compressed-tensors":
        return _unmatched(facts, settings.get("ignore") or (), "ignore has no expression 're:^mtp.*'")
    if method == "quark":
        return _unmatched(facts, settings.get("exclude") or (), "exclude has no expression 're:^mtp.*'")
    if method == "awq":
        left = settings.get("modules_to_not_convert") or ()
        missed = next((name for name in facts.float_mtp if not any(entry in name for entry in left)), None)
        return None if missed is None or not left else "modules_to_not_convert has no 'mtp'"
    if method == "auto-round":
        blocks = settings.get("block_name_to_quantize") or settings.get("to_quant_block_names") or ""
        blocks = blocks.split(",") if isinstance(blocks, str) else blocks
        inside = not any(blocks) or any(MTP.startswith(block) or block.startswith(MTP) for block in blocks)
        return "block_name_to_quantize does not leave it out" if inside else None
    left = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or ()
    missed = next((name for name in facts.float_mtp if name not in left and _experts(name) not in left), None)
    return None if missed is None or not left else f"modules_to_not_convert lacks {missed}"


def _unmatched(facts: Facts, entries: Iterable[str], why: str) -> str | None:
    expressions = [re.compile(entry.removeprefix("re:")) for entry in entries if entry.startswith("re:")]
    missed = any(not any(e.match(name) for e in expressions) for name in facts.float_mtp)
    return why if missed else None


def _experts(name: str) -> str:
    """The expert list that a module belongs to; itself if it is in none."""
    at = name.find(".experts.")
    return name if at < 0 else name[: at + len(".experts")]

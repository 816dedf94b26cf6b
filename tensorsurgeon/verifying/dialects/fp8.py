"""The Hub's native ``fp8``: E4M3 weights in blocks with ``weight_scale_inv``, as DeepSeek and Qwen publish them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorsurgeon.dtypes import F8_E4M3
from tensorsurgeon.spec import SpecMap
from tensorsurgeon.verifying.claims import TOP, Claim, Claims, Entry, EntryList, experts_parent, strings_of
from tensorsurgeon.verifying.findings import Findings


def read(config: Mapping[str, Any], specs: SpecMap, findings: Findings) -> Claims | None:
    """Claims of an fp8 config: every linear that no list names."""
    block = config.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        findings.fault(
            "config", f"config.json {TOP}.weight_block_size", f"expected two sizes such as [128, 128], found {block!r}"
        )
        return None
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        findings.fault("config", f"config.json {TOP}.fmt", f"found {config['fmt']!r}, can read 'e4m3'")
        return None
    claim = Claim(
        layout="plain", num_bits=8, code_dtype=F8_E4M3, block=(block[0], block[1]), scale_name="weight_scale_inv",
        static_inputs=config.get("activation_scheme") == "static",
    )  # fmt: skip
    key = "modules_to_not_convert" if config.get("modules_to_not_convert") else "ignored_layers"
    listed = strings_of(config, key, findings)
    entries = [Entry(key, text, "affix") for text in listed]
    kept_out = EntryList(entries)

    def of(module: str) -> Claim | None:
        if kept_out.matches(module) or module == "lm_head" or module.endswith(".lm_head"):
            return None
        parent = experts_parent(module)
        return None if parent is not None and kept_out.matches(parent) else claim

    return Claims(f"fp8 block {block[0]}x{block[1]}", of, entries, "modules_to_not_convert")

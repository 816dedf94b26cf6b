"""The Hub's native ``fp8``: E4M3 weights in blocks with ``weight_scale_inv``, as DeepSeek and Qwen publish them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorsurgeon.models.experts import expert_list
from tensorsurgeon.tensors.dtypes import F8_E4M3
from tensorsurgeon.tensors.spec import SpecMap
from tensorsurgeon.verifying.claims import TOP, Claim, Claims, Entry, EntryList, strings_of
from tensorsurgeon.verifying.findings import Findings


def read(config: Mapping[str, Any], specs: SpecMap, findings: Findings) -> Claims | None:
    """Claims of an fp8 config: every linear that no list names."""
    block = config.get("weight_block_size")
    if block is not None and not _is_block(block):
        found = f"expected two sizes such as [128, 128], found {block!r}"
        findings.fault("config", f"config.json {TOP}.weight_block_size", found)
        return None
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        findings.fault("config", f"config.json {TOP}.fmt", f"found {config['fmt']!r}, can read 'e4m3'")
        return None
    static = config.get("activation_scheme") == "static"
    if block is None:
        # One scale for each weight, and one for its inputs: as AutoFP8 wrote them, or under Mistral's names.
        claim = Claim(
            layout="plain", num_bits=8, code_dtype=F8_E4M3, group_size=0, static_inputs=static,
            scale_name=_name(specs, "weight_scale_inv", "weight_scale"),
            input_scale_name=_name(specs, "activation_scale", "input_scale"),
        )  # fmt: skip
    else:
        claim = Claim(
            layout="plain", num_bits=8, code_dtype=F8_E4M3, block=(block[0], block[1]), scale_name="weight_scale_inv",
            static_inputs=static,
        )  # fmt: skip
    key = "modules_to_not_convert" if config.get("modules_to_not_convert") else "ignored_layers"
    listed = strings_of(config, key, findings)
    entries = [Entry(key, text, "affix") for text in listed]
    kept_out = EntryList(entries)

    def of(module: str) -> Claim | None:
        if kept_out.matches(module) or module == "lm_head" or module.endswith(".lm_head"):
            return None
        parent = expert_list(module)
        return None if parent is not None and kept_out.matches(parent) else claim

    return Claims(claim.describe(), of, entries, "modules_to_not_convert")


def _name(specs: SpecMap, *names: str) -> str:
    """The first of these local names that a single value has, else the last."""
    single = {key.rpartition(".")[2] for key, spec in specs.items() if spec.shape in ((), (1,))}
    return next((name for name in names if name in single), names[-1])


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)

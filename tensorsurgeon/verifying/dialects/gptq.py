"""GPTQ, AutoRound and AWQ: ``qweight``, ``qzeros`` and ``scales``, told apart by how they are packed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from tensorsurgeon.errors import did_you_mean
from tensorsurgeon.tensors.spec import SpecMap
from tensorsurgeon.verifying.claims import TOP, Claim, Claims, Entry, EntryList, integer_of, mapping_of, strings_of
from tensorsurgeon.verifying.findings import Findings

_CHECKPOINT_FORMATS: Final = ("gptq", "gptq_v2")
# What is missing from the stored zero points, and whether the words are AWQ's.
_PACKING_FORMATS: Final = {
    "auto_round:auto_gptq": (1, False),
    "auto_round:gptq": (1, False),
    "auto_round": (0, False),
    "auto_round:gptqmodel": (0, False),
    "auto_round:auto_awq": (0, True),
    "auto_round:awq": (0, True),
}
_SPECIAL = re.compile(r"[*+?^$()\[\]{}|\\]")
_IN_LAYER = re.compile(r"(^|\.)layers\.\d+\.")


def read_gptq(config: Mapping[str, Any], specs: SpecMap, findings: Findings) -> Claims | None:
    """Claims of a GPTQModel or AutoGPTQ config: every linear of the layers but what ``dynamic`` keeps out."""
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in _CHECKPOINT_FORMATS:
        findings.fault(
            "config", f"config.json {TOP}.checkpoint_format",
            f"found {version!r}, can read {' or '.join(_CHECKPOINT_FORMATS)}{did_you_mean(str(version), _CHECKPOINT_FORMATS)}",
        )  # fmt: skip
        return None
    general = _words_claim(config, "gptq", findings, zero_offset=1 if version == "gptq" else 0)
    if general is None:
        return None
    entries: list[Entry] = []
    claims: list[tuple[Entry, Claim | None]] = []
    for pattern, changed in mapping_of(config, "dynamic", findings).items():
        try:
            entry = Entry.parse("dynamic", re.sub(r"^[-+]:", "", pattern), "match")
        except re.error as error:
            findings.fault("config", f"config.json {TOP}.dynamic", f"{pattern!r} is no regular expression: {error}")
            continue
        entries.append(entry)
        override = None if pattern.startswith("-:") else _override(general, changed)
        claims.append((entry, override))
    has_head = config.get("lm_head") is True

    def of(module: str) -> Claim | None:
        for entry, claim in claims:
            if entry.matches(module):
                return claim
        if module == "lm_head" or module.endswith(".lm_head"):
            return general if has_head else None
        return general if _IN_LAYER.search(module) else None

    return Claims(f"gptq {version}, {general.describe()}", of, entries, "dynamic")


def read_autoround(config: Mapping[str, Any], specs: SpecMap, findings: Findings) -> Claims | None:
    """Claims of an AutoRound config: every linear under the named blocks but what ``extra_config`` keeps at 16 bits."""
    packing = config.get("packing_format") or "auto_round:auto_gptq"
    if not isinstance(packing, str) or packing not in _PACKING_FORMATS:
        findings.fault(
            "config", f"config.json {TOP}.packing_format",
            f"found {packing!r}, can read {', '.join(_PACKING_FORMATS)}{did_you_mean(str(packing), list(_PACKING_FORMATS))}",
        )  # fmt: skip
        return None
    offset, is_awq = _PACKING_FORMATS[packing]
    general = _words_claim(config, "awq" if is_awq else "gptq", findings, zero_offset=offset)
    if general is None:
        return None
    key = "block_name_to_quantize" if config.get("block_name_to_quantize") else "to_quant_block_names"
    blocks = config.get(key)
    listed = blocks.split(",") if isinstance(blocks, str) else strings_of(config, key, findings)
    names = [name.strip() for name in listed if name.strip()]
    entries: list[Entry] = []
    claims: list[tuple[Entry, Claim | None]] = []
    for pattern, changed in mapping_of(config, "extra_config", findings).items():
        try:
            # vLLM searches for keys that look like expressions.
            entry = Entry.parse("extra_config", pattern, "search" if _SPECIAL.search(pattern) else "exact")
        except re.error as error:
            findings.fault("config", f"config.json {TOP}.extra_config", f"{pattern!r} is no regular expression: {error}")
            continue
        entries.append(entry)
        bits = changed.get("bits", general.num_bits) if isinstance(changed, Mapping) else general.num_bits
        claims.append((entry, None if isinstance(bits, int) and bits >= 16 else _override(general, changed)))
    exact = {entry.text: claim for entry, claim in claims if entry.how == "exact"}
    searched = [(entry, claim) for entry, claim in claims if entry.how != "exact"]
    known_blocks = [Entry("block_name_to_quantize", name, "affix") for name in names]

    def of(module: str) -> Claim | None:
        if module in exact:
            return exact[module]
        for entry, claim in searched:
            if entry.matches(module):
                return claim
        if not names:
            return general if _IN_LAYER.search(module) else None
        return general if any(module.startswith(name) for name in names) else None

    return Claims(f"auto-round {packing}, {general.describe()}", of, [*entries, *known_blocks], "extra_config")


def read_awq(config: Mapping[str, Any], specs: SpecMap, findings: Findings) -> Claims | None:
    """Claims of an AWQ config: every linear of the layers whose name has none of the given parts."""
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        findings.fault("config", f"config.json {TOP}.version", f"found {version!r}, can read 'gemm'")
        return None
    general = _words_claim(config, "awq", findings)
    if general is None:
        return None
    if config.get("zero_point") is False:
        findings.fault(
            "config", f"config.json {TOP}.zero_point",
            "is false, and readers then drop the offset of 8 that every code has; "
            "symmetric weights need true and zero points of 8",
        )  # fmt: skip
    # AWQ has no flag of its own for constant zero points; AutoRound's writer adds one.
    general = replace(general, symmetric=config.get("sym") is True)
    entries = [Entry("modules_to_not_convert", t, "substring") for t in strings_of(config, "modules_to_not_convert", findings)]
    kept_out = EntryList(entries)
    # Without the list vLLM takes it from the headers: then every float weight is meant.
    stored = {name.removesuffix(".qweight") for name in specs if name.endswith(".qweight")} if not entries else None

    def of(module: str) -> Claim | None:
        if kept_out.matches(module) or (stored is not None and module not in stored):
            return None
        return general if _IN_LAYER.search(module) else None

    return Claims(f"awq gemm, {general.describe()}", of, entries, "modules_to_not_convert")


def _words_claim(config: Mapping[str, Any], layout: str, findings: Findings, zero_offset: int = 0) -> Claim | None:
    bits, group_size = integer_of(config, "bits"), integer_of(config, "group_size", -1)
    allowed = (4,) if layout == "awq" else (2, 3, 4, 8)
    if bits is None or bits not in allowed:
        findings.fault(
            "config", f"config.json {TOP}.bits", f"found {config.get('bits')!r}, can read {', '.join(map(str, allowed))}"
        )
        return None
    if group_size is None or (group_size != -1 and group_size < 1):
        findings.fault(
            "config", f"config.json {TOP}.group_size", f"found {config.get('group_size')!r}, expected a positive size or -1"
        )
        return None
    return Claim(
        layout="awq" if layout == "awq" else "gptq", num_bits=bits, group_size=group_size,
        symmetric=config.get("sym") is not False,
        scale_name="scales", zero_offset=zero_offset, interleaved=layout == "awq", desc_act=bool(config.get("desc_act")),
    )  # fmt: skip


def _override(general: Claim, changed: Any) -> Claim:
    if not isinstance(changed, Mapping):
        return general
    return replace(
        general,
        num_bits=integer_of(changed, "bits", general.num_bits) or general.num_bits,
        group_size=integer_of(changed, "group_size", general.group_size) or general.group_size,
        symmetric=changed.get("sym", general.symmetric) is not False,
        desc_act=bool(changed.get("desc_act", general.desc_act)),
    )

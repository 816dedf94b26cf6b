"""AMD Quark: one global scheme, schemes by layer name, and a list of what to exclude."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from tensorsurgeon.errors import did_you_mean
from tensorsurgeon.models.experts import expert_list
from tensorsurgeon.tensors.dtypes import F8_E4M3, I8
from tensorsurgeon.tensors.spec import SpecMap
from tensorsurgeon.verifying.claims import TOP, Claim, Claims, Entry, EntryList, mapping_of, strings_of
from tensorsurgeon.verifying.findings import Findings

_DTYPES: Final = ("int8", "int4", "uint4", "fp8_e4m3")
_QSCHEMES: Final = ("per_channel", "per_group", "per_tensor")
_PACK_METHODS: Final = ("order", "reorder")


def read(config: Mapping[str, Any], specs: SpecMap, findings: Findings) -> Claims | None:
    """Claims of a Quark config; faults for what vLLM refuses."""
    export = config.get("export")
    pack_method: Any = "order"
    if not isinstance(export, Mapping) or "kv_cache_group" not in export or "pack_method" not in export:
        findings.fault(
            "config", f"config.json {TOP}.export",
            "must hold kv_cache_group and pack_method, without which vLLM does not read the config, "
            f"found {list(export) if isinstance(export, Mapping) else export!r}",
        )  # fmt: skip
    else:
        pack_method = export["pack_method"]
        if pack_method not in _PACK_METHODS:
            findings.fault(
                "pack-method", f"config.json {TOP}.export.pack_method",
                f"no reader knows {pack_method!r}{did_you_mean(str(pack_method), _PACK_METHODS)}",
            )  # fmt: skip
            return None
    if "layer_type_quant_config" not in config:
        findings.fault("config", f"config.json {TOP}.layer_type_quant_config", "is missing; vLLM asks for it, {} is enough")
    general = _claim(config.get("global_quant_config"), "global_quant_config", pack_method, findings)
    if general is None:
        return None
    special = []
    for pattern, entry in mapping_of(config, "layer_quant_config", findings).items():
        claim = _claim(entry, f"layer_quant_config.{pattern}", pack_method, findings)
        if claim is None:
            return None
        special.append((Entry.parse("layer_quant_config", pattern, "glob"), claim))
    excluded = _excluded(config, findings)
    by_layer = frozenset(e.text for e in excluded if e.how == "exact")
    lists = EntryList(excluded)

    def of(module: str) -> Claim | None:
        # vLLM leaves all experts of a layer alone where an entry names their list.
        if lists.matches(module) or expert_list(module) in by_layer:
            return None
        return next((claim for entry, claim in special if entry.matches(module)), general)

    return Claims("quark " + general.describe(), of, [*excluded, *(entry for entry, _ in special)], "exclude")


def _excluded(config: Mapping[str, Any], findings: Findings) -> list[Entry]:
    where = f"config.json {TOP}.exclude"
    entries = []
    for text in strings_of(config, "exclude", findings):
        if "*" in text and not text.startswith("re:"):
            findings.fault(
                "config", where, f"{text!r} is a glob, which matches nothing in vLLM; spell the names out or write re:"
            )
        try:
            how = "match" if text.startswith("re:") else "glob" if "*" in text else "exact"
            entries.append(Entry.parse("exclude", text, how))  # type: ignore[arg-type]  # one of three literals
        except re.error as error:
            findings.fault("config", where, f"{text!r} is no regular expression: {error}")
    return entries


def _claim(entry: Any, key: str, pack_method: str, findings: Findings) -> Claim | None:
    where = f"config.json {TOP}.{key}.weight"
    weight = entry.get("weight") if isinstance(entry, Mapping) else None
    if isinstance(weight, list) and len(weight) == 1:
        weight = weight[0]
    if not isinstance(weight, Mapping):
        findings.fault("config", where, f"expected a mapping, found {weight!r}")
        return None
    dtype, qscheme = weight.get("dtype"), weight.get("qscheme")
    if dtype not in _DTYPES:
        findings.fault("config", f"{where}.dtype", f"found {dtype!r}, can read {', '.join(_DTYPES)}")
        return None
    if qscheme not in _QSCHEMES:
        findings.fault("config", f"{where}.qscheme", f"found {qscheme!r}, can read {', '.join(_QSCHEMES)}")
        return None
    if weight.get("is_dynamic"):
        findings.fault("config", f"{where}.is_dynamic", "weights that are quantized while running are not in the file")
        return None
    group_size = weight.get("group_size")
    if qscheme == "per_group" and not (type(group_size) is int and group_size > 0):
        findings.fault("config", f"{where}.group_size", f"per_group needs a positive group_size, found {group_size!r}")
        return None
    inputs = entry.get("input_tensors")
    static = isinstance(inputs, Mapping) and not inputs.get("is_dynamic")
    size = {"per_channel": -1, "per_tensor": 0}.get(qscheme, group_size)
    common: dict[str, Any] = {
        "group_size": size,
        "symmetric": weight.get("symmetric") is not False,
        "static_inputs": static,
        "vector_scale": True,
    }
    if dtype in ("int4", "uint4"):
        return Claim(
            layout="quark-packed", num_bits=4, unsigned=dtype == "uint4", interleaved=pack_method == "reorder",
            transposed=qscheme == "per_group", **common,
        )  # fmt: skip
    return Claim(layout="plain", num_bits=8, code_dtype=I8 if dtype == "int8" else F8_E4M3, **common)

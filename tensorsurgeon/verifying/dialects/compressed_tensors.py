"""compressed-tensors: groups of targets with a scheme each, and a list of what to ignore."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from tensorsurgeon.errors import did_you_mean
from tensorsurgeon.tensors.dtypes import F8_E4M3, I8
from tensorsurgeon.tensors.spec import SpecMap
from tensorsurgeon.verifying.claims import TOP, Claim, Claims, Entry, EntryList, strings_of
from tensorsurgeon.verifying.findings import Findings

_LAYOUTS: Final = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
)  # fmt: skip
# Readers refuse unknown keys in these two places and nowhere else.
_GROUP_KEYS: Final = ("targets", "weights", "input_activations", "output_activations", "format")
_ARGS_KEYS: Final = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
)  # fmt: skip
_STRATEGIES: Final = ("tensor", "channel", "group", "block", "tensor_group")


def read(config: Mapping[str, Any], specs: SpecMap, findings: Findings) -> Claims | None:
    """Claims of a compressed-tensors config; faults for what its readers refuse."""
    general = config.get("format")
    status = config.get("quantization_status")
    if status != "compressed":
        findings.fault(
            "config", f"config.json {TOP}.quantization_status",
            f"found {status!r}, but readers look for packed tensors only where it is 'compressed'",
        )  # fmt: skip
    raw_groups = config.get("config_groups")
    if not isinstance(raw_groups, Mapping) or not raw_groups:
        findings.fault("config", f"config.json {TOP}.config_groups", f"expected groups of targets, found {raw_groups!r}")
        return None
    ignore = _entries(config, "ignore", "ignore", findings)
    groups: list[tuple[EntryList, bool, Claim]] = []
    entries = list(ignore)
    for name, group in raw_groups.items():
        where = f"config.json {TOP}.config_groups.{name}"
        if not isinstance(group, Mapping):
            findings.fault("config", where, f"expected a mapping, found {group!r}")
            return None
        _known_keys(group, _GROUP_KEYS, where, findings)
        claim = _claim(group, group.get("format") or general, where, findings)
        if claim is None:
            return None
        targets = _entries(group, "targets", f"config_groups.{name}.targets", findings)
        takes_all = any(e.text in ("Linear", "RoutedExperts", "FusedMoE") for e in targets)
        named = [e for e in targets if e.how != "exact" or "." in e.text or e.text[:1].islower()]
        entries += named
        groups.append((EntryList(named), takes_all, claim))
    ignored = EntryList(ignore)

    def of(module: str) -> Claim | None:
        if ignored.matches(module):
            return None
        for targets, _, claim in groups:
            if targets.matches(module):
                return claim
        # vLLM's output head is no Linear, but that of transformers is: who leaves it in float keeps it out by name.
        return next((claim for _, takes_all, claim in groups if takes_all), None)

    return Claims(f"compressed-tensors {general}", of, entries, "ignore")


def _entries(config: Mapping[str, Any], key: str, path: str, findings: Findings) -> list[Entry]:
    entries = []
    for text in strings_of(config, key, findings, path):
        try:
            entries.append(Entry.parse(path, text, "match" if text.startswith("re:") else "exact"))
        except re.error as error:
            findings.fault("config", f"config.json {TOP}.{path}", f"{text!r} is no regular expression: {error}")
    return entries


def _known_keys(found: Mapping[str, Any], known: tuple[str, ...], where: str, findings: Findings) -> None:
    for key, value in found.items():
        if key not in known:
            findings.fault(
                "config", f"{where}.{key}", f"unknown key with value {value!r}, which readers refuse{did_you_mean(key, known)}"
            )


def _claim(group: Mapping[str, Any], layout: Any, where: str, findings: Findings) -> Claim | None:
    def fault(key: str, message: str) -> None:
        findings.fault("config", f"{where}.{key}", message)

    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        fault("weights", f"expected a mapping, found {weights!r}")
        return None
    _known_keys(weights, _ARGS_KEYS, f"{where}.weights", findings)
    if layout not in _LAYOUTS:
        fault("format", f"no reader knows {layout!r}{did_you_mean(str(layout), _LAYOUTS)}")
        return None
    bits, kind, symmetric = weights.get("num_bits"), weights.get("type", "int"), weights.get("symmetric", True)
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    wanted = {
        "pack-quantized": ("int", range(2, 9)), "int-quantized": ("int", range(8, 9)), "float-quantized": ("float", range(8, 9)),
        "naive-quantized": (kind, range(8, 9)),
        "nvfp4-pack-quantized": ("float", range(4, 5)), "mxfp4-pack-quantized": ("float", range(4, 5)),
    }[layout]  # fmt: skip
    if kind != wanted[0] or bits not in wanted[1]:
        fault("weights", f"{layout} holds {wanted[0]} of {_listed(wanted[1])} bits, the config says {kind} of {bits!r} bits")
        return None
    if strategy not in _STRATEGIES:
        fault("weights.strategy", f"no reader knows {strategy!r}{did_you_mean(str(strategy), _STRATEGIES)}")
        return None
    if strategy in ("group", "tensor_group") and not (type(group_size) is int and group_size > 0):
        fault("weights.group_size", f"strategy {strategy} needs a positive group_size, found {group_size!r}")
        return None
    if strategy in ("channel", "tensor", "block") and group_size not in (None, -1):
        fault("weights.group_size", f"strategy {strategy} has no groups, but group_size is {group_size!r}; readers refuse both")
    block = weights.get("block_structure")
    if strategy == "block" and not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        fault("weights.block_structure", f"strategy block needs two sizes such as [128, 128], found {block!r}")
        return None
    if weights.get("actorder") in ("group", "dynamic", True):
        fault(
            "weights.actorder",
            f"found {weights['actorder']!r}, whose g_idx no current reader takes; expected null, 'weight' or 'static'",
        )
    inputs = group.get("input_activations")
    static = isinstance(inputs, Mapping) and inputs.get("dynamic") in (False, None, "local")
    if isinstance(inputs, Mapping):
        _known_keys(inputs, _ARGS_KEYS, f"{where}.input_activations", findings)
    size = {"tensor": 0, "channel": -1, "block": -1}.get(strategy, group_size)
    common: dict[str, Any] = {"num_bits": bits, "group_size": size, "symmetric": bool(symmetric), "static_inputs": static}
    if layout == "pack-quantized":
        return Claim(layout="ct-packed", **common)
    if layout == "nvfp4-pack-quantized" or layout == "mxfp4-pack-quantized":
        expected = 16 if layout.startswith("nvfp4") else 32
        if group_size != expected:
            fault("weights.group_size", f"{layout} has groups of {expected}, found {group_size!r}")
            return None
        return Claim(layout="nvfp4" if expected == 16 else "mxfp4", **common)
    dtype = I8 if kind == "int" else F8_E4M3
    return Claim(layout="plain", code_dtype=dtype, block=tuple(block) if strategy == "block" and block else None, **common)


def _listed(bits: range) -> str:
    return str(bits[0]) if len(bits) == 1 else f"{bits[0]} to {bits[-1]}"

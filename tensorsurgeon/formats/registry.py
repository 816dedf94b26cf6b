"""Every format by name, and the format of a checkpoint by its ``quantization_config``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

from tensorsurgeon.errors import ConfigError, RecipeError, did_you_mean
from tensorsurgeon.formats.base import Format
from tensorsurgeon.tensors.spec import SpecMap

FORMATS: Final[dict[str, str]] = {
    "quark_int8": "tensorsurgeon.formats.quark_int8:QuarkInt8",
    "quark_int4": "tensorsurgeon.formats.quark_int4:QuarkInt4",
    "quark_fp8": "tensorsurgeon.formats.quark_fp8:QuarkFp8",
    "ct_int": "tensorsurgeon.formats.ct_int:CtInt",
    "ct_packed": "tensorsurgeon.formats.ct_packed:CtPacked",
    "ct_float": "tensorsurgeon.formats.ct_float:CtFloat",
    "ct_nvfp4": "tensorsurgeon.formats.ct_fp4:CtNvfp4",
    "ct_mxfp4": "tensorsurgeon.formats.ct_fp4:CtMxfp4",
    "gptq": "tensorsurgeon.formats.gptq:Gptq",
    "autoround": "tensorsurgeon.formats.autoround:AutoRound",
    "awq": "tensorsurgeon.formats.awq:Awq",
    "hf_fp8": "tensorsurgeon.formats.hf_fp8:HfFp8",
}

_COMPRESSED_TENSORS: Final = {
    "int-quantized": "ct_int",
    "pack-quantized": "ct_packed",
    "float-quantized": "ct_float",
    "nvfp4-pack-quantized": "ct_nvfp4",
    "mxfp4-pack-quantized": "ct_mxfp4",
}
_QUARK: Final = {"int8": "quark_int8", "int4": "quark_int4", "uint4": "quark_int4", "fp8_e4m3": "quark_fp8"}


def format_class(name: str) -> type[Format]:
    """The class of a format; RecipeError for an unknown name."""
    target = FORMATS.get(name)
    if target is None:
        raise RecipeError(f"unknown format {name!r}{did_you_mean(name, list(FORMATS))}")
    module, _, class_name = target.partition(":")
    found: type[Format] = getattr(import_module(module), class_name)
    return found


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a ``config.json``, in any of the places where tools put it; None without one."""
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            found = place.get(key)
            if isinstance(found, Mapping) and found:
                return found
    return None


def detect(config: Mapping[str, Any], specs: SpecMap) -> Format | None:
    """The format in which a checkpoint is stored, set up as its config says; None if it is not quantized.

    ``config`` is the whole ``config.json``. ConfigError for a quantization that no format here reads.
    """
    found = quantization_config(config)
    if found is None:
        return None
    method = found.get("quant_method")
    if method == "compressed-tensors":
        return format_class(_COMPRESSED_TENSORS[_compressed_tensors_layout(found)])()
    if method == "quark":
        return _detect_quark(found, specs)
    if method == "gptq":
        from tensorsurgeon.formats.gptq import Gptq

        layout = _known(found, "checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
        return Gptq("gptq_v2" if layout == "gptq_v2" else "gptq", g_idx=any(n.endswith(".g_idx") for n in specs))
    if method == "auto-round":
        from tensorsurgeon.formats.autoround import PACKINGS, AutoRound

        return AutoRound(_known(found, "packing_format", PACKINGS, default="auto_round:auto_gptq"))  # type: ignore[arg-type]
    if method in ("awq", "fp8"):
        return format_class("awq" if method == "awq" else "hf_fp8")()
    known = ("compressed-tensors", "quark", "gptq", "auto-round", "awq", "fp8")
    raise ConfigError(f"quantization_config.quant_method: cannot read {method!r}; known: {', '.join(known)}")


def _compressed_tensors_layout(config: Mapping[str, Any]) -> str:
    groups = config.get("config_groups")
    layouts = {
        group.get("format") or config.get("format")
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping)
    }
    if len(layouts) > 1:
        named = ", ".join(sorted(map(str, layouts)))
        raise ConfigError(f"quantization_config.config_groups: several layouts in one checkpoint ({named}) cannot be read")
    layout = next(iter(layouts), config.get("format"))
    return _known({"format": layout}, "format", tuple(_COMPRESSED_TENSORS))


def _detect_quark(config: Mapping[str, Any], specs: SpecMap) -> Format:
    from tensorsurgeon.formats.quark_config import weight_entry

    name = _QUARK[_known(weight_entry(config), "dtype", tuple(_QUARK), path="quantization_config.global_quant_config.weight")]
    if name != "quark_int4":
        return format_class(name)()
    from tensorsurgeon.formats.quark_int4 import QuarkInt4, pack_method

    return QuarkInt4(pack_method(config, specs))


def _known(
    config: Mapping[str, Any], key: str, known: tuple[str, ...], default: str = "", path: str = "quantization_config"
) -> str:
    value = config.get(key) or default
    if value not in known:
        raise ConfigError(f"{path}.{key}: cannot read {value!r}; known: {', '.join(known)}")
    return str(value)

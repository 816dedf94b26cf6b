"""What a ``quantization_config`` tells engines to do with the inputs of its linears, module by module.

Weights are read without it. Whoever computes what an engine computes needs it: an INT8 or FP8 checkpoint multiplies
quantized inputs, a weight-only one does not, and neither names nor shapes tell which.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from tensorsurgeon.errors import ConfigError
from tensorsurgeon.formats.config_reading import TOP, section, strings
from tensorsurgeon.formats.ct_targets import Matcher
from tensorsurgeon.formats.registry import quantization_config
from tensorsurgeon.quant.inputs import InputScheme
from tensorsurgeon.tensors.spec import SpecMap

_CT_KINDS: Final = {("int", 8): "int", ("int", 4): "int", ("float", 8): "fp8", ("float", 4): "fp4"}
_STATIC_NAMES: Final = ("input_scale", "activation_scale", "input_global_scale")


class InputRule(NamedTuple):
    """How a module's inputs are quantized; ``scale``: the tensor of a static scale, and whether it divides 1 when used."""

    scheme: InputScheme
    scale: str | None = None
    is_reciprocal: bool = False


def input_rules(specs: SpecMap, modules: Iterable[str]) -> dict[str, InputRule]:
    """The rule of each quantized module in ``modules`` whose inputs engines quantize; none for weight-only ones.

    ConfigError for inputs that are quantized in a way that nothing here can compute, which names the key.
    """
    config = quantization_config(specs.config)
    if config is None:
        return {}
    rule_for = _DIALECTS.get(str(config.get("quant_method")), _nothing)(config, specs)
    found = ((module, rule_for(module)) for module in modules)
    return {module: rule for module, rule in found if rule is not None}


_RuleFor = Callable[[str], InputRule | None]


def _nothing(config: Mapping[str, Any], specs: SpecMap) -> _RuleFor:
    return lambda module: None


def _compressed_tensors(config: Mapping[str, Any], specs: SpecMap) -> _RuleFor:
    groups = []
    for name, group in section(config, "config_groups").items():
        path = f"{TOP}.config_groups.{name}"
        said = group.get("input_activations") if isinstance(group, Mapping) else None
        scheme = None if said is None else _of_arguments(said, f"{path}.input_activations")
        groups.append((Matcher(strings(group, "targets", path)), scheme))

    def rule_for(module: str) -> InputRule | None:
        scheme = next((s for targets, s in groups if targets.matches(module)), None)
        if scheme is None and not any(targets.matches(module) for targets, _ in groups):
            scheme = next((s for targets, s in groups if targets.takes_all_linears), None)
        return _with_scale(module, scheme, specs)

    return rule_for


def _of_arguments(said: Any, path: str) -> InputScheme:
    """``QuantizationArgs`` of activations."""
    if not isinstance(said, Mapping):
        raise ConfigError(f"{path}: expected a mapping, found {said!r}")
    kind = _CT_KINDS.get((str(said.get("type", "int")), said.get("num_bits", 8)))
    strategy, dynamic = said.get("strategy"), said.get("dynamic", False)
    symmetric = bool(said.get("symmetric", True))
    group = said.get("group_size") or 0
    if kind == "fp4" and strategy == "tensor_group":
        return InputScheme(type="nvfp4", num_bits=4, per="group", group_size=group or 16, is_static=dynamic in ("local", False))
    if kind == "fp4" and strategy == "group":
        return InputScheme(type="mxfp4", num_bits=4, per="group", group_size=group or 32)
    per = {"token": "token", "tensor": "tensor", "group": "group", None: "tensor"}.get(strategy)
    if kind not in ("int", "fp8") or per is None or (not symmetric and (kind != "int" or not dynamic)):
        raise ConfigError(f"{path}: inputs quantized as {dict(said)!r} cannot be computed here")
    return InputScheme(
        type=kind, num_bits=said.get("num_bits", 8), per=per, group_size=group, symmetric=symmetric, is_static=not dynamic  # type: ignore[arg-type]
    )  # fmt: skip


def _quark(config: Mapping[str, Any], specs: SpecMap) -> _RuleFor:
    whole = _of_quark(section(config, "global_quant_config"), f"{TOP}.global_quant_config")
    by_name = config.get("layer_quant_config") or {}
    special = {pattern: _of_quark(entry, f"{TOP}.layer_quant_config.{pattern}") for pattern, entry in by_name.items()}

    def rule_for(module: str) -> InputRule | None:
        scheme = next((s for pattern, s in special.items() if fnmatch.fnmatchcase(module, pattern)), whole)
        return _with_scale(module, scheme, specs)

    return rule_for


def _of_quark(entry: Any, path: str) -> InputScheme | None:
    said = entry.get("input_tensors") if isinstance(entry, Mapping) else None
    said = said[0] if isinstance(said, list) and len(said) == 1 else said
    if said is None:
        return None
    kind = {"int8": "int", "fp8_e4m3": "fp8", "fp4": "mxfp4"}.get(str(said.get("dtype"))) if isinstance(said, Mapping) else None
    # "per_channel" of an input [tokens, features] along axis 0 or 1 is what engines do per token.
    per = {"per_tensor": "tensor", "per_channel": "token", "per_token": "token", "per_group": "group"}.get(
        str(said.get("qscheme")) if isinstance(said, Mapping) else ""
    )
    if kind is None or per is None or not said.get("symmetric", True):
        raise ConfigError(f"{path}.input_tensors: inputs quantized as {said!r} cannot be computed here")
    return InputScheme(
        type=kind, num_bits=4 if kind == "mxfp4" else 8, per=per, group_size=said.get("group_size") or 0,  # type: ignore[arg-type]
        is_static=not said.get("is_dynamic") and kind != "mxfp4",
    )  # fmt: skip


def _fp8(config: Mapping[str, Any], specs: SpecMap) -> _RuleFor:
    """Blocks of weights multiply groups of inputs as wide; else one scale per token, or the one in the file."""
    block = config.get("weight_block_size")
    static = config.get("activation_scheme") == "static"
    if block is not None:
        scheme = InputScheme(type="fp8", per="group", group_size=int(block[1]))
    else:
        scheme = InputScheme(type="fp8", per="tensor" if static else "token", is_static=static)
    return lambda module: _with_scale(module, scheme, specs)


def _modelopt(config: Mapping[str, Any], specs: SpecMap) -> _RuleFor:
    """By the tensors: an ``input_scale`` means quantized inputs; FP8 without one is quantized per token or block."""
    fp4 = InputScheme(type="nvfp4", num_bits=4, per="group", group_size=16, is_static=True)
    fp8 = InputScheme(type="fp8", per="tensor", is_static=True)

    def rule_for(module: str) -> InputRule | None:
        is_fp4 = f"{module}.weight_scale_2" in specs
        if f"{module}.input_scale" not in specs:
            algorithm = str(config.get("quant_algo"))
            return None if is_fp4 or "PER_CHANNEL_PER_TOKEN" not in algorithm else InputRule(InputScheme(type="fp8"))
        return InputRule(fp4 if is_fp4 else fp8, f"{module}.input_scale", is_reciprocal=is_fp4)

    return rule_for


def _with_scale(module: str, scheme: InputScheme | None, specs: SpecMap) -> InputRule | None:
    if scheme is None or not scheme.is_static:
        return None if scheme is None else InputRule(scheme)
    found = next((f"{module}.{name}" for name in _STATIC_NAMES if f"{module}.{name}" in specs), None)
    if found is None:
        raise ConfigError(f"{module}: its inputs have a static scale by the config, and the checkpoint has none")
    return InputRule(scheme, found)


_DIALECTS: Final[dict[str, Callable[[Mapping[str, Any], SpecMap], _RuleFor]]] = {
    "compressed-tensors": _compressed_tensors,
    "quark": _quark,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "modelopt": _modelopt,
}

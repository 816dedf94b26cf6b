"""AMD Quark's ``quantization_config``: written so that vLLM reads it, read from any Quark version's dialect.

vLLM needs ``export`` (with ``kv_cache_group`` and ``pack_method``), ``layer_type_quant_config`` and
``global_quant_config``, and takes ``exclude`` as exact names or ``re:`` expressions; the globs that Quark's own API
takes (``*visual*``) match nothing there. So the exclusions are spelled out.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, Final

from tensorsurgeon.errors import ConfigError
from tensorsurgeon.formats.base import ConfigFiles, QuantizedModel, Word
from tensorsurgeon.formats.config_reading import TOP, schemes_of, section, strings
from tensorsurgeon.formats.coverage import Coverage, cover
from tensorsurgeon.formats.ct_targets import loaders_names
from tensorsurgeon.models.experts import expert_list
from tensorsurgeon.models.mtp import head_expressions, named_apart
from tensorsurgeon.models.patterns import exact_pattern, spellings
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.expressions import Expression
from tensorsurgeon.tensors.spec import SpecMap

DIALECT: Final = "0.13"
"""The Quark version whose config is written; its readers look at the keys, not at the number."""


def tensor_config(dtype: str, qscheme: str, **changed: Any) -> dict[str, Any]:
    """One ``QTensorConfig`` as Quark 0.13 writes it, nulls included, with ``changed`` in place of the defaults."""
    config: dict[str, Any] = {
        "dtype": dtype,
        "is_dynamic": False,
        "qscheme": qscheme,
        "ch_axis": None,
        "group_size": None,
        "block_size": None,
        "symmetric": True,
        "round_method": "half_even",
        "scale_type": "float",
        "scale_format": None,
        "scale_calculation_mode": None,
        "mx_element_dtype": None,
        "observer_cls": "PerChannelMinMaxObserver",
        "is_scale_quant": False,
        "zero_point_type": "int32",
    }
    return {**config, **changed}


def write_config(
    model: QuantizedModel,
    weight_config: Callable[[Scheme], dict[str, Any]],
    input_config: dict[str, Any] | None,
    format_name: str,
    pack_method: str = "order",
) -> ConfigFiles:
    """The config of a checkpoint whose modules all have one scheme; SpecError if they have several."""
    coverage = cover(model)
    scheme = coverage.only_scheme(format_name)
    return ConfigFiles(
        {
            "quant_method": "quark",
            "version": DIALECT,
            "quant_mode": "eager_mode",
            "algo_config": None,
            "softmax_quant_spec": None,
            "layer_type_quant_config": {},
            "layer_quant_config": {},
            "kv_cache_quant_config": {},
            "kv_cache_post_rope": False,
            "global_quant_config": {
                "bias": None,
                "input_tensors": input_config,
                "output_tensors": None,
                "target_device": None,
                "weight": weight_config(scheme),
            },
            "exclude": exclude(coverage),
            "export": {
                "kv_cache_group": [],
                "min_kv_scale": 0.0,
                "pack_method": pack_method,
                "weight_format": "real_quantized",
                "weight_merge_groups": None,
            },
        }
    )


def exclude(coverage: Coverage) -> list[str]:
    """Every unquantized module by name; expert lists by the layer's name, an unquantized MTP head by one expression.

    vLLM drops plain names under ``mtp.`` when it maps the main model's names, so only an expression reaches the MTP
    model, and SGLang knows no expressions; and vLLM leaves a layer's experts alone if an entry equals or lies under
    ``<layer>.mlp.experts``.
    """
    of_head = [exact_pattern(name) for name in coverage.float_linears if named_apart(name)]
    others = [*head_expressions(coverage.float_mtp), *loaders_names(coverage)]
    return [*coverage.left_out(), *(f"re:{e}" for e in (*of_head, *others))]


def read_config(
    config: Mapping[str, Any],
    specs: SpecMap,
    stored: list[str],
    scheme_of: Callable[[Mapping[str, Any], str], Scheme],
) -> dict[str, Scheme]:
    """Module -> scheme; ``scheme_of`` reads one weight entry and is told its path for messages."""
    whole = section(config, "global_quant_config")
    general = _weight_scheme(whole, f"{TOP}.global_quant_config", scheme_of)
    if config.get("layer_type_quant_config"):
        raise ConfigError(f"{TOP}.layer_type_quant_config: schemes by layer type cannot be read from tensors alone")
    by_name = config.get("layer_quant_config") or {}
    if not isinstance(by_name, Mapping):
        raise ConfigError(f"{TOP}.layer_quant_config: expected a mapping, found {by_name!r}")
    special = {
        pattern: _weight_scheme(entry, f"{TOP}.layer_quant_config.{pattern}", scheme_of) for pattern, entry in by_name.items()
    }
    excluded = Excluded(strings(config, "exclude"))

    def scheme_for(module: str) -> Scheme | None:
        if module in excluded:
            return None
        for pattern, scheme in special.items():
            if fnmatch.fnmatchcase(module, pattern):
                return scheme
        return general

    return schemes_of(stored, specs, scheme_for, scale_name="weight_scale", unquantized_key="exclude")


def word_in(config: Mapping[str, Any], specs: SpecMap) -> Word:
    """The ``dtype`` of weights in general; ConfigError if the config says nothing of them in one mapping."""
    path = f"{TOP}.global_quant_config"
    return Word(f"{path}.weight.dtype", (_weight(section(config, "global_quant_config"), path).get("dtype"),))


def _weight(entry: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    weight = entry.get("weight")
    if isinstance(weight, list):
        if len(weight) != 1:
            raise ConfigError(f"{path}.weight: weights quantized in {len(weight)} stages cannot be read")
        weight = weight[0]
    if not isinstance(weight, Mapping):
        raise ConfigError(f"{path}.weight: expected a mapping, found {weight!r}")
    if weight.get("is_dynamic"):
        raise ConfigError(f"{path}.weight.is_dynamic: weights quantized while running are not in the file")
    return weight


def _weight_scheme(entry: Mapping[str, Any], path: str, scheme_of: Callable[[Mapping[str, Any], str], Scheme]) -> Scheme:
    return scheme_of(_weight(entry, path), f"{path}.weight")


class Excluded:
    """Quark's exclusion list: exact names, ``re:`` expressions, globs, and expert lists by their layer."""

    def __init__(self, entries: tuple[str, ...]) -> None:
        self.exact = frozenset(entries)
        expressions = [e.removeprefix("re:") for e in entries if e.startswith("re:")]
        expressions += [fnmatch.translate(e) for e in entries if "*" in e and not e.startswith("re:")]
        self.expressions = [Expression.of_config(e) for e in expressions]

    def __contains__(self, module: str) -> bool:
        if expert_list(module) in self.exact:
            return True
        return any(name in self.exact or any(e.match(name) for e in self.expressions) for name in (module, *spellings(module)))

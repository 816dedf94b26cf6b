"""NVIDIA ModelOpt's quantization config: in config.json (``quant_method: modelopt``) or in hf_quant_config.json alone.

``quant_algo`` names the layout; for ``MIXED_PRECISION`` it stands in ``quantized_layers`` for each module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from tensorsurgeon.errors import ConfigError
from tensorsurgeon.formats.base import Word
from tensorsurgeon.formats.config_reading import TOP, schemes_of, section, strings
from tensorsurgeon.formats.kept_out import KeptOut
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.spec import SpecMap

MIXED: Final = "MIXED_PRECISION"


def word_in(config: Mapping[str, Any], specs: SpecMap) -> Word:
    """``quant_algo``, or for mixed precision each that a layer has."""
    algorithm = config.get("quant_algo")
    if algorithm != MIXED:
        return Word(f"{TOP}.quant_algo", (algorithm,))
    return Word(f"{TOP}.quantized_layers", tuple(dict.fromkeys(_layers(config).values())))


def read_config(
    config: Mapping[str, Any],
    specs: SpecMap,
    stored: list[str],
    words: Collection[object],
    scheme_for: Callable[[str], Scheme],
) -> dict[str, Scheme]:
    """Module -> scheme of the ``stored`` modules whose algorithm is one of ``words``."""
    left = KeptOut((*strings(config, "ignore"), *strings(config, "exclude_modules")))
    if config.get("quant_algo") == MIXED:
        layers = _layers(config)
        stored = [module for module in stored if layers.get(module) in words]
    return schemes_of(
        stored,
        specs,
        lambda module: None if module in left else scheme_for(module),
        scale_name="weight_scale",
        unquantized_key="ignore",
        float_by_tensors=True,
    )


def _layers(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for module, entry in section(config, "quantized_layers").items():
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{TOP}.quantized_layers.{module}: expected a mapping, found {entry!r}")
        found[module] = entry.get("quant_algo")
    return found

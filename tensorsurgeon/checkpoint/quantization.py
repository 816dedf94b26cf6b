"""Where tools put the quantization of a checkpoint: in one of several places of config.json, or in a file beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tensorsurgeon.errors import ConfigError
from tensorsurgeon.tensors.dtypes import WEIGHT_DTYPES
from tensorsurgeon.tensors.spec import TensorSpec

PARTS: Final = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys of config.json with the config of a model within the model, which may have the quantization instead."""
KEYS: Final = ("quantization_config", "compression_config")
FILES: Final = ("quantize_config.json", "quantization_config.json", "quant_config.json", "hf_quant_config.json")
"""Files with the quantization alone: AutoGPTQ's, AutoRound's, AutoAWQ's, ModelOpt's; beside it in config.json or instead."""
_MOST_BYTES: Final = 64 << 20


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a ``config.json``, in any of the places where tools put it; None without one."""
    for place in _places(config):
        for key in KEYS:
            found = place.get(key)
            if isinstance(found, Mapping) and found:
                return found
    return None


def _places(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for key in PARTS:
        inner = config.get(key)
        if isinstance(inner, Mapping):
            yield from _places({k: v for k, v in inner.items() if k != key})


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config from which every mention of the quantization is gone."""
    edited = {key: value for key, value in config.items() if key not in KEYS}
    for key in PARTS:
        if isinstance(edited.get(key), dict):
            edited[key] = without_quantization(edited[key])
    return edited


def with_quantization_beside(config: dict[str, Any], root: Path, specs: Iterable[TensorSpec]) -> dict[str, Any]:
    """``config`` with the quantization that only a file beside config.json has, as readers look for it there too.

    Beside tensors that are all floats such a file is stale, and says nothing.
    """
    if quantization_config(config) is not None or not any(_may_be_quantized(spec) for spec in specs):
        return config
    for name in FILES:
        path = root / name
        if path.is_file() and path.stat().st_size <= _MOST_BYTES:
            try:
                found = json.loads(path.read_bytes().decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"is not valid JSON: {error}", where=str(path)) from error
            said = _as_in_config(found, name)
            if said:
                return {**config, "quantization_config": said}
    return config


def _may_be_quantized(spec: TensorSpec) -> bool:
    return len(spec.shape) > 1 and spec.dtype not in WEIGHT_DTYPES and spec.dtype.bits != 64


def _as_in_config(found: Any, name: str) -> dict[str, Any] | None:
    """The content of such a file as config.json would have it; None where it says nothing."""
    if not isinstance(found, dict):
        return None
    modelopt = found.get("quantization")
    if isinstance(modelopt, dict):
        return {"quant_method": "modelopt", "producer": found.get("producer"), **modelopt} if modelopt.get("quant_algo") else None
    if "quant_method" in found:
        return found
    if name == "quantize_config.json" and "bits" in found:
        return {"quant_method": "gptq", **found}
    if name == "quant_config.json" and ("w_bit" in found or "bits" in found):
        return {"quant_method": "awq", **found}
    return None

"""Find the quantized modules of a checkpoint: which tensors belong to each, and what weight they stand for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from tensorsurgeon.dtypes import BF16, DTYPES, DType
from tensorsurgeon.errors import PlanError
from tensorsurgeon.formats.base import Format
from tensorsurgeon.formats.registry import detect, quantization_config
from tensorsurgeon.quant.grid import Scheme
from tensorsurgeon.spec import SpecMap, TensorSpec

# Tensors that share a module's path and say nothing about its weight.
_NOT_OF_THE_WEIGHT = {"bias"}
_CONFIG_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class StoredModule(NamedTuple):
    """One quantized module: its scheme, its tensors by local name in file order, and the shape of its weight."""

    name: str
    scheme: Scheme
    tensors: dict[str, TensorSpec]
    shape: tuple[int, int]


def stored_format(specs: SpecMap) -> Format:
    """The format that config.json names; PlanError if the checkpoint is not quantized."""
    found = detect(specs.config, specs)
    if found is None:
        raise PlanError("config.json has no quantization_config: the checkpoint is not quantized, there is nothing to unpack")
    return found


def stored_modules(specs: SpecMap, layout: Format) -> list[StoredModule]:
    """Every quantized module, as config and tensors agree on it."""
    config: Mapping[str, object] = quantization_config(specs.config) or {}
    schemes = layout.read_config(config, specs)
    owned: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in specs.items():
        module, _, local = name.rpartition(".")
        if module in schemes and local not in _NOT_OF_THE_WEIGHT:
            owned[module][local] = spec._replace(name=local)
    return [
        StoredModule(module, scheme, owned[module], layout.weight_shape(owned[module], scheme))
        for module, scheme in schemes.items()
    ]


def model_dtype(specs: SpecMap) -> DType:
    """The element type that the model computes in, as its config says; BF16 if it does not."""
    for key in ("dtype", "torch_dtype"):
        for value in (specs.config.get(key), specs.config_value(key)):
            if isinstance(value, str) and value.removeprefix("torch.") in _CONFIG_DTYPES:
                return DTYPES[_CONFIG_DTYPES[value.removeprefix("torch.")]]
    return BF16

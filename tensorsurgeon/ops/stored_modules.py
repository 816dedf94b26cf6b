"""Find the quantized modules of a checkpoint: which tensors belong to each, and what weight they stand for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tensorsurgeon.errors import NumericError, PlanError
from tensorsurgeon.formats.base import Format
from tensorsurgeon.formats.coding import Stored
from tensorsurgeon.formats.registry import detect, quantization_config
from tensorsurgeon.formats.scales import ZERO_POINT
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, DTYPES, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

# Tensors that share a module's path and say nothing about its weight.
_NOT_OF_THE_WEIGHT = {"bias"}
_CONFIG_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class StoredModule(NamedTuple):
    """One quantized module: how it is stored, its tensors by local name in file order, and the shape of its weight."""

    name: str
    stored: Stored
    tensors: dict[str, TensorSpec]
    shape: tuple[int, int]

    @property
    def scheme(self) -> Scheme:
        return self.stored.scheme


def stored_format(specs: SpecMap) -> Format:
    """The format that config.json names; PlanError if the checkpoint is not quantized."""
    found = detect(specs.config, specs)
    if found is None:
        raise PlanError("config.json has no quantization_config: the checkpoint is not quantized, there is nothing to unpack")
    return found


def stored_modules(specs: SpecMap, layout: Format, may_drop: Sequence[str] = ()) -> list[StoredModule]:
    """Every quantized module, as config and tensors agree on it.

    PlanError for a tensor of a module that its layout does not know and that is not in ``may_drop``: it could be part
    of what the weight means (a scale of the inputs, a correction of low rank), and would be lost.
    """
    config: Mapping[str, object] = quantization_config(specs.config) or {}
    schemes = layout.read_config(config, specs)
    owned: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in specs.items():
        module, _, local = name.rpartition(".")
        if module in schemes and local not in _NOT_OF_THE_WEIGHT:
            owned[module][local] = spec._replace(name=local)
    alike: dict[Stored, Stored] = {}
    modules = []
    for module, scheme in schemes.items():
        stored = Stored(layout, scheme, tuple(owned[module]))
        # One object for all modules that are stored alike: a plan keeps tens of thousands.
        stored = alike.setdefault(stored, stored)
        modules.append(StoredModule(module, stored, owned[module], layout.weight_shape(owned[module], scheme)))
    dtype = model_dtype(specs)
    allowed = {*may_drop, ZERO_POINT}
    for found in modules:
        known = {spec.name for spec in layout.tensors(TensorSpec("weight", dtype, found.shape), found.scheme)}
        strange = [name for name in found.tensors if name not in known and name not in allowed]
        if strange:
            raise PlanError(
                f"{found.name}.{strange[0]}: {layout.name} has no such tensor, and it would be lost; drop it first if the "
                "weight means the same without it"
            )
    return modules


def unpack(stored: Stored, inputs: Sequence[np.ndarray]) -> Quantized:
    """The codes of a module from its arrays, in the order of ``stored.names``.

    NumericError where codes said to be symmetric have zero points that are not zero.
    """
    arrays = dict(zip(stored.names, inputs, strict=True))
    if stored.scheme.symmetric and ZERO_POINT in arrays and np.any(arrays[ZERO_POINT]):
        raise NumericError(f"{ZERO_POINT} is not zero, but the config says that the codes are symmetric")
    return stored.format.unpack(arrays, stored.scheme)


def model_dtype(specs: SpecMap) -> DType:
    """The element type that the model computes in, as its config says; BF16 if it does not."""
    for key in ("dtype", "torch_dtype"):
        for value in (specs.config.get(key), specs.config_value(key)):
            if isinstance(value, str) and value.removeprefix("torch.") in _CONFIG_DTYPES:
                return DTYPES[_CONFIG_DTYPES[value.removeprefix("torch.")]]
    return BF16

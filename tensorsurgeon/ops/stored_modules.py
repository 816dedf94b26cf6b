"""Find the quantized modules of a checkpoint: which tensors belong to each, and what weight they stand for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tensorsurgeon.errors import CheckpointError, NumericError, PlanError
from tensorsurgeon.formats.base import Format
from tensorsurgeon.formats.coding import Stored
from tensorsurgeon.formats.mxfp4_blocks import Mxfp4Blocks
from tensorsurgeon.formats.registry import formats_of, quantization_config
from tensorsurgeon.formats.scales import KV_SCALES, WEIGHT_SHAPE, ZERO_POINT
from tensorsurgeon.formats.stored_checks import check_stored, lies_beside_codes, refuse_left_behind
from tensorsurgeon.planning.rewriting import Rewrite
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, DTYPES, DType
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec

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


def stored_modules(specs: SpecMap, may_drop: Sequence[str] = ()) -> list[StoredModule]:
    """Every quantized module, as config and tensors agree on it, whatever formats the checkpoint has side by side.

    PlanError if the checkpoint is not quantized, and for a tensor of a module that its layout does not know and that
    is not in ``may_drop``: it could be part of what the weight means (a scale of the inputs, a correction of low
    rank), and would be lost. ConfigError where tensors are missing or have other dtypes or shapes than the config
    calls for, and for codes that no module owns and that would be left without their scales.
    """
    config: Mapping[str, Any] = quantization_config(specs.config) or {}
    schemes: dict[str, tuple[Format, Scheme]] = {}
    for layout in formats_of(specs.config, specs):
        schemes.update((module, (layout, scheme)) for module, scheme in layout.read_config(config, specs).items())
    if not schemes and any(isinstance(layout, Mxfp4Blocks) for layout in formats_of(specs.config, specs)):
        return []
    if not schemes:
        raise PlanError("config.json has no quantization_config: the checkpoint is not quantized, there is nothing to unpack")
    owned: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in specs.items():
        module, _, local = name.rpartition(".")
        if module not in schemes:
            refuse_left_behind(spec)
        elif local not in _NOT_OF_THE_WEIGHT:
            owned[module][local] = spec._replace(name=local)
    dtype, allowed = model_dtype(specs), {*may_drop, ZERO_POINT}
    alike: dict[Stored, Stored] = {}
    shapes: dict[tuple[Any, ...], tuple[int, int]] = {}
    modules = []
    for module, (layout, scheme) in schemes.items():
        tensors = owned[module]
        stored = Stored(layout, scheme, tuple(tensors))
        # One object for all modules that are stored alike: a plan keeps tens of thousands.
        stored = alike.setdefault(stored, stored)
        form = id(stored), tuple(spec[1:] for spec in tensors.values())
        if form not in shapes:
            shapes[form] = check_stored(module, tensors, layout, scheme, dtype)
            known = {*layout.local_names(scheme), *allowed, *layout.optional}
            strange = next((name for name in tensors if name not in known), None)
            if strange is not None:
                raise PlanError(
                    f"{module}.{strange}: {layout.name} has no such tensor, and it would be lost; drop it first if the "
                    "weight means the same without it"
                )
        modules.append(StoredModule(module, stored, tensors, shapes[form]))
    return modules


def cache_scales(specs: SpecMap) -> list[Rewrite]:
    """Rewrites that drop the scales of a quantized KV cache: the config that gives them a meaning goes."""
    found = [spec for name, spec in specs.items() if name.rpartition(".")[2] in KV_SCALES]
    return [Rewrite((Region(spec),), (), moves_bytes=True) for spec in found if not lies_beside_codes(spec, specs)]


def unpack(stored: Stored, inputs: Sequence[np.ndarray], made: Region) -> Quantized:
    """The codes of a module from its arrays, in the order of ``stored.names``; ``made``: the rows that they are made into.

    A shape that lies beside the codes is that of the whole weight: CheckpointError if its rows are others. NumericError where
    codes said to be symmetric have zero points that are not zero.
    """
    arrays = {name: _matrix(array) for name, array in zip(stored.names, inputs, strict=True)}
    if made.start is not None and made.stop is not None and WEIGHT_SHAPE in arrays:
        rows, columns = map(int, arrays[WEIGHT_SHAPE].reshape(-1))
        if rows != made.spec.shape[0]:
            raise CheckpointError(f"{WEIGHT_SHAPE} says {[rows, columns]}, but the codes have {made.spec.shape[0]} rows")
        arrays[WEIGHT_SHAPE] = np.array((made.stop - made.start, columns), np.int64)
    if stored.scheme.symmetric and ZERO_POINT in arrays and np.any(arrays[ZERO_POINT]):
        raise NumericError(f"{ZERO_POINT} is not zero, but the config says that the codes are symmetric")
    return stored.format.unpack(arrays, stored.scheme)


def _matrix(array: np.ndarray) -> np.ndarray:
    """The same without the axes of 1 beyond two, which planning lets pass: [4, 32, 1] says what [4, 32] says."""
    for axis in reversed(range(array.ndim)):
        if array.ndim > 2 and array.shape[axis] == 1:
            array = array.squeeze(axis)
    return array


def model_dtype(specs: SpecMap) -> DType:
    """The element type that the model computes in, as its config says; BF16 if it does not."""
    return stated_dtype(specs) or BF16


def stated_dtype(specs: SpecMap) -> DType | None:
    """The element type that the config says the model computes in; None if it says none."""
    for key in ("dtype", "torch_dtype"):
        for value in (specs.config.get(key), specs.config_value(key)):
            if isinstance(value, str) and value.removeprefix("torch.") in _CONFIG_DTYPES:
                return DTYPES[_CONFIG_DTYPES[value.removeprefix("torch.")]]
    return None

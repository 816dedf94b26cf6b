"""What calibration has to quantize: the weights of a plan's quantize steps, as rows of the model's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import nn

from tensorsurgeon.calibrate.walk.experts import ExpertStack
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.calibrate.walk.naming import ParameterRows, rows_of
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.errors import PlanError
from tensorsurgeon.formats.coding import written_by
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.resolving import Pieces
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.spec import Region, TensorSpec


class SourceRows(NamedTuple):
    """Rows of a checkpoint tensor seen as ``[-1, last axis]``."""

    name: str
    start: int
    stop: int


@dataclass
class Linear:
    """One weight to quantize: its spec under the name it has by then, and the checkpoint rows it is made of.

    ``units`` are the plan's units that write it.
    """

    weight: TensorSpec
    scheme: Scheme
    method: str
    layer: int | None
    rows: list[SourceRows] = field(default_factory=list)
    units: set[int] = field(default_factory=set)
    reason: str = ""

    @property
    def module(self) -> str:
        """The weight's module, by the name it has when it is quantized."""
        return self.weight.module

    def read(self, reader: TensorReader) -> np.ndarray:
        """The weight [N, K] in its own dtype, from the shards."""
        array = np.empty(self.weight.shape, self.weight.dtype.numpy)
        view = array.reshape(-1).view(np.uint8).data
        position = 0
        for name, start, stop in self.rows:
            position += reader.rows_into(name, start, stop, view[position:])
        return array


def find_linears(plan: Plan, model: StreamedModel | None) -> list[Linear]:
    """Every weight that a step with method ``gptq`` or ``imatrix`` quantizes, in the order of the plan's units.

    ``layer`` is None, with a reason, for weights that no statistics can be had for: outside the decoder layers, or not
    made of rows of checkpoint tensors. Those are rounded to nearest. Raises PlanError for grids that GPTQ does not know.
    """
    layer_of = {} if model is None else {name: n for n in range(len(model.layers)) for name in model.source_names(n)}
    specs = list(plan.source.specs.values())
    found: dict[tuple[int, str], Linear] = {}
    chunks: dict[tuple[int, str], list[tuple[int, list[SourceRows] | None]]] = {}
    for number, unit in enumerate(plan.units):
        for task in unit.tasks:
            written = written_by(task.rewrite.detail)
            if written is None or written.method == "rtn":
                continue
            scheme = written.scheme
            if scheme.type != "int":
                raise PlanError(f"method {written.method} chooses integer codes; {scheme.type} has only method rtn")
            for region, pieces in zip(task.rewrite.inputs, task.inputs, strict=True):
                key = (task.step, region.spec.name)
                linear = found.setdefault(key, Linear(region.spec, scheme, written.method, None))
                linear.units.add(number)
                chunks.setdefault(key, []).append((region.start or 0, _source_rows(region, pieces, specs)))
    for key, linear in found.items():
        _place(linear, sorted(chunks[key], key=lambda chunk: chunk[0]), layer_of)
    return list(found.values())


def _source_rows(region: Region, pieces: Pieces, specs: Sequence[TensorSpec]) -> list[SourceRows] | None:
    rows = []
    for origin, start, nbytes in pieces:
        if origin < 0:
            return None
        spec = specs[origin]
        width = spec.row_bytes
        if spec.dtype is not region.spec.dtype or width != region.spec.row_bytes or start % width or nbytes % width:
            return None
        rows.append(SourceRows(spec.name, start // width, (start + nbytes) // width))
    return rows


def _place(linear: Linear, chunks: list[tuple[int, list[SourceRows] | None]], layer_of: Mapping[str, int]) -> None:
    for _, rows in chunks:
        if rows is None:
            linear.reason = "is not made of whole rows of the checkpoint's tensors"
            return
        linear.rows += rows
    layers = {layer_of.get(name) for name, _, _ in linear.rows}
    if len(layers) > 1:
        linear.reason = "is made of tensors of several layers"
    elif layers == {None}:
        linear.reason = "lies outside the decoder layers that transformers runs"
    else:
        (linear.layer,) = layers


def linears_by_layer(linears: Sequence[Linear], count: int) -> dict[int, list[Linear]]:
    """Linears by layer; those whose units also write what belongs to another layer are rounded to nearest."""
    layers: dict[int, set[int]] = {}
    for linear in linears:
        for unit in linear.units:
            layers.setdefault(unit, set()).add(-1 if linear.layer is None else linear.layer)
    found: dict[int, list[Linear]] = {}
    for linear in linears:
        if linear.layer is not None and any(layers[unit] != {linear.layer} for unit in linear.units):
            linear.layer, linear.reason = None, "is written together with weights of another layer"
        if linear.layer is not None:
            found.setdefault(linear.layer, []).append(linear)
    return {number: found[number] for number in range(count) if number in found}


class Part(NamedTuple):
    """Rows ``start`` to ``stop`` of a linear, all of one parameter and, in stacked experts, of one expert.

    ``key`` names the input whose statistics they go by.
    """

    linear: int
    start: int
    stop: int
    rows: ParameterRows
    key: str
    expert: int | None


def parts_of(
    linears: Sequence[Linear], traced: Mapping[str, list[tuple[int, ParameterRows]]], keys: Keys
) -> tuple[list[Part], dict[int, str]]:
    """The parts of each linear, and the linears that have none, with the reason."""
    parts: list[Part] = []
    without: dict[int, str] = {}
    for number, linear in enumerate(linears):
        mine: list[Part] = []
        position = 0
        for name, start, stop in linear.rows:
            for rows in rows_of(traced.get(name, []), start, stop) or ():
                for cut, key, expert in keys.split(rows):
                    size = cut.stop - cut.start
                    mine.append(Part(number, position, position + size, cut, key, expert))
                    position += size
        if position == linear.weight.rows:
            parts += mine
        else:
            without[number] = "is no linear layer whose input can be observed"
    return parts, without


class Keys:
    """Names the input of each parameter's rows: a linear's own name, or one per stack or per expert."""

    def __init__(self, linears: set[str], stacks: Mapping[str, tuple[int, bool]]) -> None:
        self._linears = linears
        self._stacks = stacks

    def split(self, rows: ParameterRows) -> list[tuple[ParameterRows, str, int | None]]:
        """Runs of one key each; nothing for a parameter that is neither a linear's weight nor stacked experts."""
        module, _, leaf = rows.parameter.rpartition(".")
        if leaf == "weight" and module in self._linears:
            return [(rows, module, None)]
        if rows.parameter not in self._stacks:
            return []
        height, shared = self._stacks[rows.parameter]
        result: list[tuple[ParameterRows, str, int | None]] = []
        start = rows.start
        while start < rows.stop:
            expert = start // height
            stop = min(rows.stop, (expert + 1) * height)
            key = rows.parameter if shared else f"{rows.parameter}.{expert}"
            result.append((ParameterRows(rows.parameter, start, stop), key, expert))
            start = stop
        return result


def keys_of(name: str, layer: nn.Module, stacks: Sequence[ExpertStack], own: Mapping[str, bool]) -> Keys:
    """The keys of a layer called ``name``; ``own`` says which first projections have a Hessian per expert."""
    linears = {f"{name}.{local}" for local, module in layer.named_modules() if isinstance(module, nn.Linear)}
    heights = {}
    for stack in stacks:
        heights[stack.first_name] = (stack.first_shape[1], not own[stack.first_name])
        heights[stack.down_name] = (stack.down_shape[1], False)
    return Keys(linears, heights)

"""What calibration has to quantize: the weights of a plan's quantize steps, as rows of the model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import nn

from tensorsurgeon.calibrate.codes.origins import Origins
from tensorsurgeon.calibrate.walk.lines import Lines, Traced
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.calibrate.walk.stacks import ExpertStack
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.formats.coding import written_by
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.resolving import Pieces
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.running.inputs import made_region
from tensorsurgeon.tensors.spec import Region, TensorSpec


@dataclass
class Linear:
    """One weight to quantize: its spec under the name it has by then, and the lines of checkpoint tensors it is made of.

    ``together``: the weights, itself among them, that share a scale for the whole of them and are written as one.
    ``pieces`` are the regions of it that the plan's steps make, in order; ``units`` are the plan's units that write it.
    """

    weight: TensorSpec
    scheme: Scheme
    method: str
    layer: int | None
    together: tuple[str, ...]
    lines: list[Lines] = field(default_factory=list)
    pieces: list[tuple[Region, Pieces]] = field(default_factory=list)
    units: set[int] = field(default_factory=set)
    reason: str = ""

    @property
    def module(self) -> str:
        """The weight's module, by the name it has when it is quantized."""
        return self.weight.module

    def read(self, plan: Plan, source: Source) -> np.ndarray:
        """The weight [N, K] in its own dtype, as the plan's steps make it of the shards."""
        parts = [made_region(region, pieces, plan.resolved, plan.steps, source) for region, pieces in self.pieces]
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        # Nobody else holds it.
        array.flags.writeable = True
        return array


# Original weights, as they are before they are quantized.
ReadOriginal = Callable[[Linear], np.ndarray]


def find_linears(plan: Plan, model: StreamedModel | None) -> list[Linear]:
    """Every weight that a step with method ``gptq``, ``imatrix`` or ``signround`` quantizes, in the order of the plan's units.

    ``layer`` is None, with a reason, for weights that no statistics can be had for: outside the decoder layers, or not
    made of lines of checkpoint tensors. Those are rounded to nearest.
    """
    layer_of = {} if model is None else {name: n for n in range(len(model.layers)) for name in model.source_names(n)}
    found: dict[tuple[int, str], Linear] = {}
    for number, unit in enumerate(plan.units):
        for task in unit.tasks:
            written = written_by(task.rewrite.detail)
            if written is None or not written.is_calibrated:
                continue
            scheme = written.scheme
            together = tuple(region.spec.name for region in task.rewrite.inputs)
            for region, pieces in zip(task.rewrite.inputs, task.inputs, strict=True):
                key = (task.step, region.spec.name)
                linear = found.setdefault(key, Linear(region.spec, scheme, written.method, None, together))
                linear.units.add(number)
                linear.pieces.append((region, pieces))
    origins = Origins(plan)
    for linear in found.values():
        linear.pieces.sort(key=lambda piece: piece[0].start or 0)
        _place(linear, origins, layer_of)
    return list(found.values())


def _place(linear: Linear, origins: Origins, layer_of: Mapping[str, int]) -> None:
    for region, pieces in linear.pieces:
        lines = origins.lines(region, pieces)
        if lines is None:
            linear.reason = "is not made of whole rows or columns of the checkpoint's tensors"
            return
        linear.lines += lines
    layers = {layer_of.get(lines.name) for lines in linear.lines}
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
    """Rows ``start`` to ``stop`` of a linear, all lines of one parameter and, in stacked experts, of one expert.

    ``key`` names the input whose statistics they go by.
    """

    linear: int
    start: int
    stop: int
    lines: Lines
    key: str
    expert: int | None


def parts_of(linears: Sequence[Linear], traced: Traced, keys: Keys) -> tuple[list[Part], dict[int, str]]:
    """The parts of each linear, and the linears that have none, with the reason."""
    parts: list[Part] = []
    without: dict[int, str] = {}
    for number, linear in enumerate(linears):
        mine: list[Part] = []
        position = 0
        for source in linear.lines:
            for lines in traced.became(source) or ():
                for cut, key, expert in keys.split(lines):
                    mine.append(Part(number, position, position + cut.total, cut, key, expert))
                    position += cut.total
        if position != linear.weight.rows:
            without[number] = "is no linear layer whose input can be observed"
        elif not _has_whole_blocks(linear, mine):
            without[number] = "has blocks that are short, or lie in several parameters"
        else:
            parts += mine
    # What is written as one has codes of its own in all of its weights or in none.
    lost = {name for number in without for name in linears[number].together}
    for number, linear in enumerate(linears):
        if linear.weight.name in lost:
            without.setdefault(number, "is written together with a weight that is rounded to nearest")
    return [part for part in parts if part.linear not in without], without


def _has_whole_blocks(linear: Linear, parts: Sequence[Part]) -> bool:
    """Whether no part begins within a block of rows, and columns are whole blocks."""
    block = linear.scheme.block
    return block is None or not (linear.weight.shape[1] % block[1] or any(part.start % block[0] for part in parts))


def schemes_of(linears: Sequence[Linear], parts: Sequence[Part]) -> dict[int, Scheme]:
    """The schemes of the linears that have parts, by number."""
    return {part.linear: linears[part.linear].scheme for part in parts}


class Outputs(NamedTuple):
    """Of a parameter of stacked experts: outputs of one, the rows of matrices whose columns they are, and whose input they see.

    ``shared``: all experts see the statistics of ``key``, else each has its own.
    """

    height: int
    turned: int
    key: str
    shared: bool


class Keys:
    """Names the input of each parameter's lines: a linear's own name, or one per stack or per expert.

    ``linears``: whether a module's weight is stored [in, out].
    """

    def __init__(self, linears: Mapping[str, bool], stacks: Mapping[str, Outputs]) -> None:
        self._linears = linears
        self._stacks = stacks

    def split(self, lines: Lines) -> list[tuple[Lines, str, int | None]]:
        """Runs of one key each; nothing for lines that are no outputs of a linear or of stacked experts."""
        module, _, leaf = lines.name.rpartition(".")
        if leaf == "weight" and module in self._linears:
            return [(lines, module, None)] if self._linears[module] == bool(lines.turned) else []
        outputs = self._stacks.get(lines.name)
        if outputs is None or outputs.turned != lines.turned:
            return []
        result: list[tuple[Lines, str, int | None]] = []
        first = 0
        while first < lines.total:
            expert = (lines.start + first * lines.step) // outputs.height
            last = min(lines.total, -(-((expert + 1) * outputs.height - lines.start) // lines.step))
            result.append((lines.within(first, last), outputs.key if outputs.shared else f"{outputs.key}.{expert}", expert))
            first = last
        return result


def keys_of(name: str, layer: nn.Module, stacks: Sequence[ExpertStack], own: Mapping[str, bool]) -> Keys:
    """The keys of a layer called ``name``; ``own`` says which first projections have a Hessian per expert."""
    kinds = {f"{name}.{local}": stored_turned(module) for local, module in layer.named_modules()}
    linears = {module: is_turned for module, is_turned in kinds.items() if is_turned is not None}
    outputs = {}
    for stack in stacks:
        for parameter, (height, turned) in stack.parameters.items():
            if parameter == stack.down_name:
                outputs[parameter] = Outputs(height, turned, stack.down_name, False)
            else:
                outputs[parameter] = Outputs(height, turned, stack.first_name, not own[stack.first_name])
    return Keys(linears, outputs)


def stored_turned(module: nn.Module) -> bool | None:
    """Whether a linear's weight is stored [in, out], as GPT-2's Conv1D does; None for what is no linear."""
    if isinstance(module, nn.Linear):
        return False
    return True if type(module).__name__ == "Conv1D" and "nf" in vars(module) else None

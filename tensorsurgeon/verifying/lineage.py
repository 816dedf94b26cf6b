"""What the recorded recipe makes of the source's bytes, computed here once more.

The plan says for every output which pieces of which source tensors it holds; that statement of what was asked for is
planning's on purpose. What a step computes on the way (transposing, cutting columns, casting, decoding) is done here
again in plain NumPy, so that a mistake of the writer is not repeated.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import Final, NamedTuple

import numpy as np

from tensorsurgeon.checkpoint.tensor_reader import TensorReader, elements
from tensorsurgeon.models.stacks import ExpertCut, axes_of_stack
from tensorsurgeon.planning.resolving import Piece, Resolved, Task
from tensorsurgeon.planning.rewriting import Rewrite, Transform
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec
from tensorsurgeon.verifying.described import Described
from tensorsurgeon.verifying.layouts import stored_weight
from tensorsurgeon.verifying.layouts.mxfp4_blocks import BLOCKS, expert_of_blocks
from tensorsurgeon.verifying.made import MadeTensor

# Arrays that were computed and may be asked for again: the parts of one transposed stack come one after the other.
_KEPT_ARRAYS: Final = 2
_DECODED_ROWS: Final = 256


class UnknownStepError(Exception):
    """A step computes something that is not restated here."""


class Replay(NamedTuple):
    """The steps of a recipe and what they make of a source."""

    steps: Sequence[Transform]
    resolved: Resolved

    @property
    def specs(self) -> SpecMap:
        """Every tensor that the recipe makes."""
        return self.resolved.specs


class Lineage:
    """Bytes of planned tensors, from any thread."""

    def __init__(self, replay: Replay, source: TensorReader, modules: Described) -> None:
        self._steps, self._resolved = replay
        self.source, self._modules = source, modules
        self._names = list(source.specs)
        self._lock = threading.RLock()
        self._kept: OrderedDict[int, Sequence[np.ndarray]] = OrderedDict()

    def task_of(self, piece: Piece) -> tuple[Task, int]:
        """The task that makes a piece that is none of the source, and which of its outputs it is."""
        number, position = self._resolved.made[-1 - piece.origin]
        return self._resolved.tasks[number], position

    def step_of(self, task: Task) -> str:
        """The op that a task belongs to: ``Cast``."""
        return type(self._steps[task.step]).__name__

    def source_name(self, piece: Piece) -> str:
        """The source tensor that a piece is of."""
        return self._names[piece.origin]

    def steps_behind(self, pieces: Sequence[Piece]) -> set[str]:
        """Every op that computes something on the way from the source to these pieces."""
        tasks = [self.task_of(piece)[0] for piece in pieces if piece.origin < 0]
        return {self.step_of(task) for task in tasks}.union(*(self.steps_behind(p) for task in tasks for p in task.inputs))

    def can_compute(self, pieces: Sequence[Piece]) -> bool:
        """Whether every step behind these pieces is restated here."""
        for piece in pieces:
            if piece.origin < 0:
                task, _ = self.task_of(piece)
                if self.step_of(task) not in _COMPUTED or not all(map(self.can_compute, task.inputs)):
                    return False
                if self.step_of(task) == "Dequantize" and not self._is_known(task.rewrite.inputs[0].spec):
                    return False
        return True

    def _is_known(self, codes: TensorSpec) -> bool:
        return codes.module in self._modules.modules or codes.name.endswith(BLOCKS)

    def read(self, pieces: Sequence[Piece], start: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes] from byte ``start`` of the tensor that the pieces are."""
        parts = []
        position = 0
        for origin, first, length in pieces:
            low, high = max(start, position), min(start + nbytes, position + length)
            if low < high:
                offset = first + low - position
                if origin >= 0:
                    parts.append(self.source.bytes_of(self._names[origin], offset, high - low))
                else:
                    parts.append(self._made(origin)[offset : offset + high - low])
            position += length
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.uint8)

    def _made(self, origin: int) -> np.ndarray:
        number, position = self._resolved.made[-1 - origin]
        with self._lock:
            arrays = self._kept.get(number)
            if arrays is None:
                arrays = [_bytes(a) for a in self._compute(self._resolved.tasks[number])]
                self._kept[number] = arrays
                while len(self._kept) > _KEPT_ARRAYS:
                    self._kept.popitem(last=False)
            return arrays[position]

    def _compute(self, task: Task) -> Sequence[np.ndarray]:
        rewrite = task.rewrite
        kind = self.step_of(task)
        if kind == "Dequantize":
            return [self._decoded(task)]
        arrays = [self._array(pieces, region) for pieces, region in zip(task.inputs, rewrite.inputs, strict=True)]
        if kind == "Transpose":
            assert isinstance(rewrite.detail, tuple)
            return [arrays[0].transpose(rewrite.detail)]
        if kind == "SplitExperts":
            return _parts_of_expert(arrays[0], rewrite)
        if kind == "StackExperts":
            return [_expert_of_parts(arrays, rewrite)]
        if kind == "Split":
            ends = list(accumulate(region.shape[-1] for region in rewrite.outputs))
            return np.split(arrays[0], ends[:-1], axis=-1)
        if kind == "Concat":
            return [np.concatenate(arrays, axis=-1)]
        if kind == "Cast":
            with np.errstate(over="ignore", invalid="ignore"):
                return [arrays[0].astype(rewrite.outputs[0].spec.dtype.numpy)]
        raise UnknownStepError(kind)

    def _array(self, pieces: Sequence[Piece], region: Region) -> np.ndarray:
        data = self.read(pieces, 0, sum(piece.nbytes for piece in pieces))
        return elements(data, region.spec).reshape(region.shape)

    def _decoded(self, task: Task) -> np.ndarray:
        """A whole weight of the source, or an expert of a stack, decoded by the judge's own reading."""
        spec = task.rewrite.outputs[0].spec
        if task.rewrite.inputs[0].spec.name.endswith(BLOCKS):
            blocks, exponents = (self._array(p, r) for p, r in zip(task.inputs, task.rewrite.inputs, strict=True))
            expert = expert_of_blocks(blocks, exponents)
            axes = axes_of_stack(self.source.specs, spec.name)
            return (expert.T if axes == ("in", "out") else expert).astype(spec.dtype.numpy)
        module = self._modules.modules.get(task.rewrite.inputs[0].spec.module)
        if module is None:
            raise UnknownStepError("Dequantize")
        weight = stored_weight(self.source, module.name, module.claim, module.shape)
        result = np.empty(module.shape, spec.dtype.numpy)
        for start in range(0, module.shape[0], _DECODED_ROWS):
            stop = min(start + _DECODED_ROWS, module.shape[0])
            result[start:stop] = weight.rows(start, stop)
        return result


_COMPUTED: Final = frozenset({"Transpose", "Split", "SplitExperts", "StackExperts", "Concat", "Cast", "Dequantize"})


def _parts_of_expert(stacked: np.ndarray, rewrite: Rewrite) -> list[np.ndarray]:
    """The parts of one expert: runs of its outputs, or every other one; outputs are columns where it lies transposed."""
    cut = rewrite.detail
    assert isinstance(cut, ExpertCut)
    is_bias = len(rewrite.outputs[0].shape) == 1
    outputs = stacked.reshape(-1) if is_bias else stacked.T if cut.transposed else stacked
    return [outputs[n :: cut.parts] if cut.interleaved else np.split(outputs, cut.parts)[n] for n in range(cut.parts)]


def _expert_of_parts(parts: Sequence[np.ndarray], rewrite: Rewrite) -> np.ndarray:
    """One expert as its stack holds it: its parts' outputs below each other or in turn, as columns where it lies transposed."""
    cut = rewrite.detail
    assert isinstance(cut, ExpertCut)
    outputs = np.empty((cut.parts * len(parts[0]), *parts[0].shape[1:]), parts[0].dtype)
    for number, part in enumerate(parts):
        rows = slice(number, None, cut.parts) if cut.interleaved else slice(number * len(part), (number + 1) * len(part))
        outputs[rows] = part
    return outputs.T if cut.transposed else outputs


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class PlannedTensor(MadeTensor):
    """A tensor as the recipe makes it."""

    __slots__ = ("lineage", "pieces")

    def __init__(self, lineage: Lineage, spec: TensorSpec, pieces: Sequence[Piece]) -> None:
        super().__init__(spec)
        self.lineage, self.pieces = lineage, pieces if isinstance(pieces, tuple) else tuple(pieces)

    @property
    def name(self) -> str:
        """The source tensor it begins with."""
        return self.first_source(self.pieces)

    def first_source(self, pieces: Sequence[Piece]) -> str:
        """The source tensor that these pieces begin with; empty for bytes that come from none."""
        for piece in pieces:
            if piece.origin >= 0:
                return self.lineage.source_name(piece)
            found = (self.first_source(p) for p in self.lineage.task_of(piece)[0].inputs)
            return next((name for name in found if name), "")
        return ""

    def bytes_of(self, start: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes]."""
        return self.lineage.read(self.pieces, start, nbytes)

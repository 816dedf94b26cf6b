"""Where each expert of a stack lies, said here once more: no op and no plan is asked, so that none of their mistakes is shared.

``models/`` says how a family stacks (axes, parts, in turn or below each other). A stack in MXFP4 holds each expert as
[out, in], whatever the float stack of the class does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.models.stacks import Stacked, axes_of_stack, stacked_tensors
from tensorsurgeon.tensors.dtypes import F8_E8M0, F32, U8
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec
from tensorsurgeon.verifying.dialects import quantization_of
from tensorsurgeon.verifying.layouts.mxfp4_blocks import BLOCKS, expert_of_blocks
from tensorsurgeon.verifying.made import MadeTensor

SCALES = "_scales"
_GROUP = 32
# Of the number of an expert.
_DIGITS = 9


class Stacks:
    """The stacks of a source; SpecError where one holds its experts in a way that is not known."""

    def __init__(self, source: TensorReader) -> None:
        self.reader = source
        self.coded = dict(_coded(source.specs)) if _says_mxfp4(source.specs) else {}
        self.decoded = {name: self._as_float(name, blocks) for name, blocks in self.coded.items()}
        consumed = {name + ending for name in self.coded for ending in (BLOCKS, SCALES)}
        rest = [spec for name, spec in source.specs.items() if name not in consumed]
        self.stacked = stacked_tensors(SpecMap([*rest, *self.decoded.values()], source.specs.config))

    def _as_float(self, name: str, blocks: TensorSpec) -> TensorSpec:
        experts, rows, groups, _ = blocks.shape
        matrix = rows, groups * _GROUP
        return TensorSpec(name, F32, (experts, *(reversed(matrix) if self.is_turned(name) else matrix)))

    def is_turned(self, name: str) -> bool:
        """Whether the float stack of this name holds experts as [in, out]."""
        return axes_of_stack(self.reader.specs, name) == ("in", "out")

    def experts(self, name: str) -> Iterator[ExpertPart]:
        """Every linear of every expert of this stack, or its bias."""
        stacked = self.stacked[name]
        for expert in range(stacked.experts):
            for number in range(len(stacked.stack.parts)):
                yield ExpertPart(self, stacked, expert, number)

    def part_named(self, name: str) -> ExpertPart | None:
        """What is called so where experts lie one by one: ``x.mlp.experts.7.up_proj.weight``."""
        into, expert, part, leaf = ["", "", "", *name.rsplit(".", 3)][-4:]
        found = self._parts.get((into, part, leaf))
        if found is None or not expert.isdecimal() or len(expert) > _DIGITS or int(expert) >= found[0].experts:
            return None
        return ExpertPart(self, found[0], int(expert), found[1])

    @cached_property
    def _parts(self) -> dict[tuple[str, str, str], tuple[Stacked, int]]:
        return {
            (stacked.into, part, "bias" if stacked.is_bias else "weight"): (stacked, number)
            for stacked in self.stacked.values()
            for number, part in enumerate(stacked.stack.parts)
        }

    def expert(self, stacked: Stacked, expert: int) -> np.ndarray:
        """One expert, its outputs along the first axis: [out, in], or [out] of a bias; float32 where it lies in MXFP4."""
        name = stacked.spec.name
        if name in self.coded:
            return self.decoded_expert(name, expert)
        rows = 1 if stacked.is_bias else stacked.spec.rows // stacked.experts
        array = self.reader.rows(name, expert * rows, (expert + 1) * rows)
        if stacked.is_bias:
            return np.asarray(array[0])
        return array.T if stacked.stack.axes == ("in", "out") else array

    def decoded_expert(self, name: str, expert: int) -> np.ndarray:
        """float32 [out, in] of a stack in MXFP4."""
        _, rows, groups, _ = self.coded[name].shape
        first, stop = expert * rows, (expert + 1) * rows
        blocks = self.reader.rows(name + BLOCKS, first * groups, stop * groups)
        return expert_of_blocks(blocks, self.reader.rows(name + SCALES, first, stop).view(np.uint8))


def _says_mxfp4(specs: SpecMap) -> bool:
    config = quantization_of(specs.config)
    return isinstance(config, dict) and config.get("quant_method") == "mxfp4"


def _coded(specs: SpecMap) -> Iterator[tuple[str, TensorSpec]]:
    """Name of the float stack and its codes, where scales of the right shape lie beside them."""
    for name, blocks in specs.items():
        stem = name.removesuffix(BLOCKS)
        scales = specs.get(stem + SCALES)
        if name.endswith(BLOCKS) and scales is not None and len(blocks.shape) == 4:
            fits = scales.shape == blocks.shape[:3] and blocks.shape[3] * 2 == _GROUP
            if fits and blocks.dtype is U8 and scales.dtype in (U8, F8_E8M0):
                yield stem, blocks


class _Last(threading.local):
    """What a thread computed last: a tensor is asked for in pieces."""

    of: tuple[object, ...] = ()
    array: np.ndarray


_last = _Last()


class ExpertPart(MadeTensor):
    """One linear of one expert, or its bias."""

    __slots__ = ("_expert", "_number", "_stacked", "_stacks")

    def __init__(self, stacks: Stacks, stacked: Stacked, expert: int, number: int) -> None:
        self._stacks, self._stacked, self._expert, self._number = stacks, stacked, expert, number
        parts = stacked.stack.parts
        each = stacked.spec.rows // stacked.experts, stacked.spec.shape[-1]
        if stacked.is_bias:
            shape: tuple[int, ...] = (stacked.spec.shape[-1] // len(parts),)
        else:
            out, in_ = reversed(each) if stacked.stack.axes == ("in", "out") else each
            shape = out // len(parts), in_
        leaf = "bias" if stacked.is_bias else "weight"
        super().__init__(TensorSpec(f"{stacked.into}.{expert}.{parts[number]}.{leaf}", stacked.spec.dtype, shape))

    @property
    def name(self) -> str:
        """The stack as it lies in the source."""
        name = self._stacked.spec.name
        return name + BLOCKS if name in self._stacks.coded else name

    def bytes_of(self, start: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes]."""
        stack, source = self._stacked.stack, self._stacked.spec
        if not self._in_turn and source.name not in self._stacks.coded and (self._stacked.is_bias or stack.axes == ("out", "in")):
            # One run of bytes.
            at = (self._expert * len(stack.parts) + self._number) * self.spec.nbytes
            return self._stacks.reader.bytes_of(source.name, at + start, nbytes)
        whose = (self._stacks, self._stacked.spec.name, self._expert, self._number)
        if _last.of != whose:
            outputs = self._stacks.expert(self._stacked, self._expert)
            count = len(self._stacked.stack.parts)
            size = len(outputs) // count
            mine = slice(self._number, None, count) if self._in_turn else slice(self._number * size, (self._number + 1) * size)
            _last.array = np.ascontiguousarray(outputs[mine]).reshape(-1).view(np.uint8)
            _last.of = whose
        return _last.array[start : start + nbytes]

    @property
    def _in_turn(self) -> bool:
        return self._stacked.stack.interleaved and len(self._stacked.stack.parts) > 1


class DecodedStack(MadeTensor):
    """A stack in MXFP4 as the float stack that its class has."""

    __slots__ = ("_stacks",)

    def __init__(self, stacks: Stacks, name: str) -> None:
        super().__init__(stacks.decoded[name])
        self._stacks = stacks

    @property
    def name(self) -> str:
        """The codes."""
        return self.spec.name + BLOCKS

    def bytes_of(self, start: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], from experts one after the other."""
        each = self.spec.nbytes // self.spec.shape[0]
        found = []
        for expert in range(start // each, -(-(start + nbytes) // each)):
            whose = (self._stacks, self.spec.name, expert)
            if _last.of != whose:
                outputs = self._stacks.decoded_expert(self.spec.name, expert)
                lying = outputs.T if self._stacks.is_turned(self.spec.name) else outputs
                _last.array = np.ascontiguousarray(lying).reshape(-1).view(np.uint8)
                _last.of = whose
            found.append(_last.array[max(0, start - expert * each) : start + nbytes - expert * each])
        return np.concatenate(found)

"""A quantized checkpoint as its readers compute with it: the same tensors, with floats in the place of codes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Literal

import numpy as np
from torch import Tensor

from tensorsurgeon.calibrate.walk.model import check_weight
from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.quantization import quantization_config, without_quantization
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.ops.stored_modules import model_dtype
from tensorsurgeon.planning.rewriting import Rewrite, advance
from tensorsurgeon.quant.rtn.plain_torch import tensor_of
from tensorsurgeon.tensors.dtypes import BF16, F16
from tensorsurgeon.tensors.spec import Region, SpecMap

_Name = Literal["BF16", "F16", "F32"]


class FloatWeights:
    """Tensors by name, unpacked when they are read; ``checkpoint`` has their specs and no quantization any more.

    Of a checkpoint that is not quantized, the tensors as they lie. ``modules`` are the quantized ones. ``checkpoint`` is
    for looking only: its locations are those of the codes.
    """

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._made: dict[str, list[Rewrite]] = defaultdict(list)
        self.checkpoint: Checkpoint = reader.checkpoint
        self.modules: list[str] = []
        if quantization_config(reader.checkpoint.config) is None:
            return
        specs = reader.checkpoint.specs
        dtype = model_dtype(specs)
        name: _Name = "BF16" if dtype is BF16 else "F16" if dtype is F16 else "F32"
        self._step = Dequantize(dtype=name)
        rewrites = self._step.plan(specs)
        for rewrite in rewrites:
            for region in rewrite.outputs:
                self._made[region.spec.name].append(rewrite)
        self.modules = [name.rpartition(".")[0] for name in self._made]
        floats = SpecMap(advance(specs, rewrites).values(), without_quantization(dict(specs.config)))
        self.checkpoint = replace(reader.checkpoint, specs=floats)

    def read(self, name: str) -> Tensor:
        """A whole tensor in ordinary memory; NumericError where codes and scales make no finite weight."""
        if name not in self._made:
            check_weight(self._reader, name)
            return tensor_of(self._reader.array(name))
        spec = self.checkpoint.specs[name]
        pieces = self._made[name]
        if len(pieces) == 1:
            return tensor_of(self._apply(pieces[0]))
        whole = np.empty(spec.shape, np.dtype(spec.dtype.numpy))
        for piece in pieces:
            (region,) = piece.outputs
            whole[region.start : region.stop] = self._apply(piece)
        return tensor_of(whole)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a matrix; of a quantized one all are unpacked for it."""
        if name in self._made:
            return self.read(name)[start:stop]
        check_weight(self._reader, name)
        return tensor_of(self._reader.rows(name, start, stop))

    def number(self, name: str) -> float:
        """The one value of a stored scale."""
        return float(self._reader.array(name).astype(np.float32).reshape(-1)[0])

    def _apply(self, rewrite: Rewrite) -> np.ndarray:
        (weight,) = self._step.apply(rewrite, [self._stored(region) for region in rewrite.inputs])
        return np.asarray(weight)

    def _stored(self, region: Region) -> np.ndarray:
        if region.start is None or region.stop is None:
            return self._reader.array(region.spec.name)
        return self._reader.rows(region.spec.name, region.start, region.stop)

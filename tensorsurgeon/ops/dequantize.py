"""Turn quantized modules back into float weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar, Literal

import numpy as np

from tensorsurgeon.errors import NumericError, SurgeonError
from tensorsurgeon.formats.coding import stored_in
from tensorsurgeon.formats.registry import quantization_config
from tensorsurgeon.formats.scales import INPUT_SCALES, KV_SCALES
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.ops.row_blocks import block_scratch, codes_scratch, row_blocks, stored_pieces, stored_specs
from tensorsurgeon.ops.stored_modules import cache_scales, stored_modules, unpack
from tensorsurgeon.ops.stored_stacks import stored_stacks
from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.tensors.arrays import empty
from tensorsurgeon.tensors.dtypes import DTYPES
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec


@dataclass(frozen=True, kw_only=True)
@typed_fields
class Dequantize:
    """Replace the codes and scales of every quantized module by a ``weight`` of ``dtype``.

    The formats are those that config.json names, and the quantization leaves the config. Weights are computed in F32
    and rounded once; what is not finite then stops the run. Static scales of a module's inputs and of a KV cache go too:
    a float weight takes its inputs as they are. One-way: codes cannot be told from weights. ``if_quantized``: a checkpoint
    without a quantization, or unpacked by a step before, passes as it is.
    """

    dtype: Literal["BF16", "F16", "F32"] = "BF16"
    if_quantized: bool = False
    writes_floats: ClassVar[bool] = True
    backend: str = field(default="auto", repr=False, metadata={"recipe": False})

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        if self.if_quantized and (quantization_config(specs.config) is None or specs.unpacked is not None):
            return ()
        rewrites = []
        for module in stored_modules(specs, may_drop=(*INPUT_SCALES, *KV_SCALES)):
            target = TensorSpec(f"{module.name}.weight", DTYPES[self.dtype], module.shape)
            for inputs, start, stop in stored_pieces(module, target, specs):
                made = Region(target) if stop - start == target.shape[0] else Region(target, start, stop)
                rewrites.append(Rewrite(inputs, (made,), detail=module.stored))
        rewrites += stored_stacks(specs, DTYPES[self.dtype])
        return (*rewrites, *cache_scales(specs))

    def scratch_bytes(self, rewrite: Rewrite) -> int:
        """The codes, a byte each, scales in F32, and the values of a few rows."""
        elements = prod(rewrite.outputs[0].shape)
        stored = stored_in(rewrite.detail)
        turned = elements * rewrite.outputs[0].spec.dtype.bits // 8 if stored is not None and stored.transposed else 0
        return turned + codes_scratch(elements, stored_specs(rewrite.inputs), 2) + block_scratch(elements)

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        stored = stored_in(rewrite.detail)
        assert stored is not None  # plan put it there
        shape = rewrite.outputs[0].shape
        weight = empty(shape[::-1] if stored.transposed else shape, np.dtype(rewrite.outputs[0].spec.dtype.numpy))
        start = 0
        for block in self.rows(rewrite, inputs):
            weight[start : start + len(block)] = block
            start += len(block)
        return (np.ascontiguousarray(weight.T) if stored.transposed else weight,)

    def gives_rows(self, rewrite: Rewrite) -> bool:
        """Whether ``rows`` are the weight's own."""
        stored = stored_in(rewrite.detail)
        return stored is not None and not stored.transposed

    def rows(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Iterator[Array]:
        """The weight, some rows at a time."""
        target = rewrite.outputs[0].spec
        stored = stored_in(rewrite.detail)
        assert stored is not None  # plan put it there
        try:
            # How scales are stored matters to those who choose codes.
            backend = choose_backend(self.backend, replace(stored.scheme, scale_dtype=None), target.dtype)
            first = rewrite.outputs[0].start or 0
            for start, _, rows in row_blocks(unpack(stored, inputs, rewrite.outputs[0]), stored.scheme):
                with np.errstate(over="ignore", invalid="ignore"):
                    block = backend.dequantize(rows, stored.scheme, target.dtype)
                    _refuse_nonfinite(block, first + start)
                yield block
        except SurgeonError as error:
            raise NumericError(f"{target.module}: {error.message}") from error


def _refuse_nonfinite(weight: Array, first: int) -> None:
    """NumericError for infinities and NaNs: codes or scales that are none, or a product that the dtype cannot hold.

    ``first`` is the number of the first row.
    """
    wrong = ~np.isfinite(weight)
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise NumericError(
            f"{int(wrong.sum())} of {weight.size} weights are not finite, the first at row {first + row}, column {column} "
            f"({float(weight[row, column])}): its code or scale is none, or {weight.dtype} cannot hold their product"
        )

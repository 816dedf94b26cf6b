"""Give weights that were unpacked in F32, and that nothing quantized since, the dtype that the model computes in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tensorsurgeon.errors import NumericError
from tensorsurgeon.ops.row_blocks import chunk_rows, is_large
from tensorsurgeon.ops.stored_modules import model_dtype
from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.tensors.dtypes import F32
from tensorsurgeon.tensors.spec import Region, SpecMap


@dataclass(frozen=True, slots=True)
class Round:
    """The last step where codes were unpacked on the way to other codes: what stays a float is rounded once.

    One-way. The dtype is the one that config.json names, BF16 if it names none.
    """

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        dtype, unpacked = model_dtype(specs), specs.unpacked or frozenset()
        rewrites = []
        for name in specs:
            spec = specs[name]
            if name not in unpacked or spec.dtype is not F32 or dtype is F32:
                continue
            made = spec._replace(dtype=dtype)
            if len(spec.shape) not in (2, 3) or not is_large(spec):
                rewrites.append(Rewrite((Region(spec),), (Region(made),)))
                continue
            # The pieces in which the weight was unpacked, of a stack the experts.
            step = chunk_rows(spec) if len(spec.shape) == 2 else spec.shape[1]
            for start in range(0, spec.rows, step):
                stop = min(start + step, spec.rows)
                rewrites.append(Rewrite((Region(spec, start, stop),), (Region(made, start, stop),)))
        return tuple(rewrites)

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        (weight,) = inputs
        spec = rewrite.outputs[0].spec
        with np.errstate(over="ignore"):
            rounded = weight.astype(spec.dtype.numpy)
        if not np.isfinite(rounded).all():
            raise NumericError(f"{spec.name}: weights that {spec.dtype} cannot hold; the model's dtype is what config.json says")
        return (rounded,)

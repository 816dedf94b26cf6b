"""Turn quantized modules back into float weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tensorsurgeon.errors import NumericError, PlanError, SurgeonError
from tensorsurgeon.formats.coding import stored_in
from tensorsurgeon.formats.scales import INPUT_SCALES
from tensorsurgeon.ops.stored_modules import stored_format, stored_modules, unpack
from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.tensors.dtypes import DTYPES
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Dequantize:
    """Replace the codes and scales of every quantized module by a ``weight`` of ``dtype``.

    The format is the one that config.json names, and the quantization leaves the config. Weights are computed in F32
    and rounded once. Static scales of a module's inputs go too: a float weight takes its inputs as they are. One-way:
    codes cannot be told from weights.
    """

    dtype: Literal["BF16", "F16", "F32"] = "BF16"
    backend: str = field(default="auto", repr=False)

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        layout = stored_format(specs)
        rewrites = []
        for module in stored_modules(specs, layout, may_drop=INPUT_SCALES):
            target = TensorSpec(f"{module.name}.weight", DTYPES[self.dtype], module.shape)
            inputs = tuple(Region(specs[f"{module.name}.{local}"]) for local in module.tensors)
            rewrites.append(Rewrite(inputs, (Region(target),), detail=module.stored))
        if not rewrites:
            raise PlanError("the quantization_config names no module that is quantized; there is nothing to unpack")
        return tuple(rewrites)

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        target = rewrite.outputs[0].spec
        stored = stored_in(rewrite.detail)
        assert stored is not None  # plan put it there
        try:
            backend = choose_backend(self.backend, stored.scheme, target.dtype)
            return (backend.dequantize(unpack(stored, inputs), stored.scheme, target.dtype),)
        except SurgeonError as error:
            raise NumericError(f"{target.module}: {error.message}") from error

"""Turn quantized modules back into float weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tensorsurgeon.errors import NumericError, PlanError, SurgeonError
from tensorsurgeon.formats.base import Format
from tensorsurgeon.formats.scales import INPUT_SCALES
from tensorsurgeon.ops.stored_modules import StoredModule, stored_format, stored_modules, unpack
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
    # Filled in by plan, read by apply: which module a rewrite belongs to.
    _modules: dict[str, StoredModule] = field(default_factory=dict, init=False, repr=False, compare=False)
    _layout: list[Format] = field(default_factory=list, init=False, repr=False, compare=False)

    def for_one_plan(self) -> Dequantize:
        """The same step for another source."""
        return replace(self)

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        layout = stored_format(specs)
        self._layout[:] = [layout]
        rewrites = []
        for module in stored_modules(specs, layout, may_drop=INPUT_SCALES):
            target = TensorSpec(f"{module.name}.weight", DTYPES[self.dtype], module.shape)
            self._modules[target.name] = module
            inputs = tuple(Region(specs[f"{module.name}.{local}"]) for local in module.tensors)
            rewrites.append(Rewrite(inputs, (Region(target),)))
        if not rewrites:
            raise PlanError("the quantization_config names no module that is quantized; there is nothing to unpack")
        return tuple(rewrites)

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        target = rewrite.outputs[0].spec
        module = self._modules[target.name]
        try:
            quantized = unpack(self._layout[0], module, inputs)
            backend = choose_backend(self.backend, module.scheme, target.dtype)
            return (backend.dequantize(quantized, module.scheme, target.dtype),)
        except SurgeonError as error:
            raise NumericError(f"{module.name}: {error.message}") from error

    def edit_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config without the quantization; the model's own ``dtype`` stays, for that is what it computes in."""
        return config_without_quantization(config)


def config_without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config from which every mention of the quantization is gone."""
    edited = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if isinstance(edited.get("text_config"), dict):
        edited["text_config"] = config_without_quantization(edited["text_config"])
    return edited

"""What is stored in float and could have been quantized: linears, and experts in stacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.models.experts import is_expert_list
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec


def unquantized_linears(specs: SpecMap, quantized: Mapping[str, Any]) -> list[str]:
    """Modules with a float weight that an engine could take for a linear, and stacked experts, in file order."""
    model = describe_model(specs)
    linears = frozenset(model.linears())
    found: dict[str, None] = {}
    for name, _, shape in model.floats:
        module = name.rpartition(".")[0]
        if (len(shape) == 2 and module in linears and module not in quantized) or (len(shape) == 3 and is_expert_list(module)):
            found[module] = None
    return list(found)


def stacked_weight(spec: TensorSpec) -> bool:
    """Whether a tensor holds the experts of a layer, stacked."""
    return len(spec.shape) == 3 and is_expert_list(spec.module)

"""The tensors of a quantized module by local name, and how a module that has them is told from others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from tensorsurgeon.tensors.dtypes import BF16, F16, F32, DType
from tensorsurgeon.tensors.spec import TensorSpec

FLOATS: Final = (BF16, F16, F32)
# Local names that only quantized modules have.
MARKERS: Final = frozenset({
    "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape", "weight_global_scale",
    "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale", "qweight", "qzeros", "scales", "g_idx",
    "weight_scale_2", "activation_scale",
})  # fmt: skip
# Never the weight of a quantized module, and nothing a quantized module must not have beside its weight.
_PLAIN_COMPANIONS: Final = frozenset({"bias"})
_CODE_DTYPES: Final = frozenset({"I8", "U8", "I32", "F8_E4M3", "F8_E5M2", "F4"})


class Part(NamedTuple):
    """One tensor of a module: which types and shapes it may have, and whether it must be there."""

    local: str
    dtypes: tuple[DType, ...]
    shapes: tuple[tuple[int, ...], ...]
    required: bool = True

    def describe(self) -> str:
        """``F16[4, 64]``, with every choice there is."""
        return f"{' or '.join(d.name for d in self.dtypes)}{' or '.join(str(list(s)) for s in self.shapes)}"


def is_stored_quantized(tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a module's tensors (by local name) are those of a quantized one, whatever a config says."""
    if not MARKERS.isdisjoint(tensors):
        return True
    weight = tensors.get("weight")
    return weight is not None and len(weight.shape) == 2 and weight.dtype.name in _CODE_DTYPES


def describe_stored(tensors: Mapping[str, TensorSpec]) -> str:
    """What a module stores, for a message: ``weight I8[64, 128], weight_scale F32[64]``."""
    return ", ".join(
        f"{local} {spec.dtype.name}{list(spec.shape)}" for local, spec in tensors.items() if local not in _PLAIN_COMPANIONS
    )

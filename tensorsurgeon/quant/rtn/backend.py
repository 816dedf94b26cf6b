"""Who makes codes of weights: compiled loops on the CPU ("fast"), or torch, the reference ("torch").

Both give the same bits; tests hold them to it. A backend knows no names, so its errors say where in the matrix, and
the caller adds which matrix.
"""

from __future__ import annotations

from functools import cache
from typing import Final, Protocol

import numpy as np

from tensorsurgeon.errors import NumericError, RecipeError, SpecError, did_you_mean
from tensorsurgeon.quant.rtn.arithmetic import Arithmetic
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F32, WEIGHT_DTYPES, DType

BACKENDS: Final = ("auto", "fast", "torch")


class Backend(Protocol):
    """Codes from weights and back, by the rule of a scheme; stateless, so threads may share one."""

    name: str

    def serves(self, scheme: Scheme, dtype: DType) -> bool:
        """Whether weights of this dtype can be quantized by this scheme."""
        ...

    def quantize(self, weight: np.ndarray, scheme: Scheme, *, global_amax: float | None = None) -> Quantized:
        """Codes and scales of a weight [N, K] in BF16, F16 or F32.

        ``global_amax``: the largest magnitude of all weights that share one NVFP4 global scale, where there are
        several (a fused layer, or rows of a larger matrix); otherwise that of ``weight``. NumericError for weights
        or scales that are not finite; SpecError if groups do not divide a row.
        """
        ...

    def dequantize(self, quantized: Quantized, scheme: Scheme, dtype: DType) -> np.ndarray:
        """Weights [N, K] in ``dtype``: computed in F32, rounded once."""
        ...


def choose_backend(name: str, scheme: Scheme, dtype: DType) -> Backend:
    """The named backend, or for "auto" the fast one where it serves; SpecError if it does not serve."""
    if name not in BACKENDS:
        raise RecipeError(f"unknown backend {name!r}{did_you_mean(name, BACKENDS)}")
    for candidate in ("fast", "torch") if name == "auto" else (name,):
        backend = _backend(candidate)
        if backend.serves(scheme, dtype):
            return backend
    raise SpecError(f"the {name} backend cannot quantize {dtype.name} by {scheme}")


@cache
def _backend(name: str) -> Backend:
    # Imported where chosen: torch costs a second.
    if name == "fast":
        from tensorsurgeon.quant.rtn.fast import FastBackend

        return FastBackend()
    from tensorsurgeon.quant.rtn.plain_torch import TorchBackend

    return TorchBackend()


def is_supported(scheme: Scheme, dtype: DType) -> bool:
    """Whether a rule exists for weights of this dtype: both backends know the same ones."""
    if dtype not in WEIGHT_DTYPES or scheme.clip_search:
        return False
    rules = {"fp8": ("compressed-tensors", "quark"), "nvfp4": ("compressed-tensors",), "mxfp4": ("compressed-tensors",)}
    if scheme.type != "int" and (scheme.rule not in rules[scheme.type] or not scheme.symmetric):
        return False
    return scheme.type in ("nvfp4", "mxfp4") or scheme.scale_dtype is None or scheme.scale_dtype in WEIGHT_DTYPES


def check_groups(shape: tuple[int, ...], scheme: Scheme) -> None:
    """SpecError unless ``shape`` is a matrix whose rows are whole groups."""
    if len(shape) != 2:
        raise SpecError(f"a linear weight [out, in] is needed, got shape {list(shape)}")
    size = scheme.group_size
    if scheme.block is None and size != -1 and (size < 1 or shape[1] % size):
        raise SpecError(f"group_size {size} does not divide in_features {shape[1]}")


def refuse_nonfinite_weight(weight: np.ndarray) -> None:
    """Raise the NumericError of a weight that holds infinities or NaNs: how many, and where the first is."""
    wrong = ~np.isfinite(weight)
    row, column = (int(i) for i in np.argwhere(wrong)[0])
    raise NumericError(
        f"{int(wrong.sum())} of {weight.size} weights are not finite, the first at row {row}, column {column} "
        f"({float(weight[row, column])})"
    )


def refuse_nonfinite_scale(scale: np.ndarray, arithmetic: Arithmetic) -> None:
    """Raise the NumericError of scales that overflowed the dtype in which they are computed or stored."""
    wrong = ~np.isfinite(scale)
    row, group = (int(i) for i in np.argwhere(wrong)[0])
    narrow = arithmetic.stored if arithmetic.math is F32 else arithmetic.math
    raise NumericError(
        f"{int(wrong.sum())} of {scale.size} scales overflow {narrow.name}, the first at row {row}, group {group}; "
        "choose a format or scale_dtype of wider range, or exclude this weight"
    )

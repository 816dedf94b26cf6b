"""Rounding to nearest with searched scales: the least squared error instead of the tool's scale.

No tool does this by default, so neither does any transform; it costs nothing on disk and needs no data.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.errors import SpecError
from tensorsurgeon.quant.gptq.scale_search import StoreScale, round_to_nearest, search_scale
from tensorsurgeon.quant.rtn.backend import Backend
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F16, F32, DType

_TORCH = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32}


def stored_as(dtype: DType | None) -> StoreScale:
    """Rounds F32 scales to what a format will store."""
    target = _TORCH[dtype or F32]

    def store(scale: Tensor) -> Tensor:
        return scale.to(target).to(torch.float32)

    return store


def quantize_searched(weight: np.ndarray, scheme: Scheme, backend: Backend) -> Quantized:
    """Codes of a weight [N, K] under the scales, 0.4 to 1.05 of the tool's, that give the least squared error.

    Zero points stay the tool's. SpecError for schemes other than integers.
    """
    if scheme.type != "int":
        raise SpecError(f"clip_search chooses scales of integer codes; {scheme.type} has none to choose")
    base = backend.quantize(weight, replace(scheme, clip_search=False))
    values = torch.from_numpy(np.ascontiguousarray(weight, np.float32))
    zero_point = None if base.zero_point is None else torch.from_numpy(base.zero_point.astype(np.float32))
    scale = search_scale(
        values,
        torch.from_numpy(np.ascontiguousarray(base.scale)),
        zero_point,
        qmin=scheme.qmin,
        qmax=scheme.qmax,
        group_size=scheme.group_size,
        store_scale=stored_as(scheme.scale_dtype),
    )
    codes = round_to_nearest(values, scale, zero_point, qmin=scheme.qmin, qmax=scheme.qmax)
    return base._replace(codes=codes.numpy(), scale=scale.numpy())

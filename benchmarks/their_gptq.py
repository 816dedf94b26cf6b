"""llm-compressor's batched ``quantize_weight``, without what its package loads beside it (data sets, entry points)."""

from __future__ import annotations

import importlib.util
import sys
import time
import types
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@cache
def their_quantize_weight() -> Any:
    """The function itself; ImportError where llm-compressor is not installed."""
    found = importlib.util.find_spec("llmcompressor")
    if found is None or not found.submodule_search_locations:
        raise ImportError("llmcompressor is not installed")
    root = Path(next(iter(found.submodule_search_locations)))
    for name in ("llmcompressor", "llmcompressor.modifiers", "llmcompressor.modifiers.gptq"):
        if name not in sys.modules:
            shell = types.ModuleType(name)
            shell.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = shell
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    return quantize_weight


def measure(weight: Tensor, hessian: Tensor, scale: Tensor) -> tuple[float, float]:
    """Seconds a matrix of the second of two runs, and tr(D H D^T) / tr(W H W^T): int4, groups of 128, static order."""
    from compressed_tensors.quantization import QuantizationArgs

    quantize_weight = their_quantize_weight()
    scheme = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128, actorder="static")
    seconds = 0.0
    made = weight
    for _ in range(2):
        # It writes into what it is given.
        given = weight.clone(), hessian.clone(), scale.clone(), torch.zeros_like(scale)
        if weight.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        made, _, _ = quantize_weight(*given, None, scheme)
        if weight.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    change = weight - made
    error = (torch.bmm(change, hessian) * change).sum() / (torch.bmm(weight, hessian) * weight).sum()
    return seconds / len(weight), float(error)

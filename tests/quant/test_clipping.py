"""Searched scales never give a larger squared error than the tool's own, and stay on the stored grid."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from tensorsurgeon.errors import SpecError
from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.quant.rtn.clipping import quantize_searched
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F16


def squared_error(weight: np.ndarray, quantized: Quantized) -> np.ndarray:
    per_group = weight.shape[1] // quantized.scale.shape[1]
    codes = quantized.codes.astype(np.float32)
    if quantized.zero_point is not None:
        codes = codes - np.repeat(quantized.zero_point.astype(np.float32), per_group, 1)
    difference = codes * np.repeat(quantized.scale, per_group, 1) - weight.astype(np.float32)
    return (difference**2).reshape(len(weight), -1, per_group).sum(2)


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rule", "scale_dtype"), [("compressed-tensors", BF16), ("gptq", F16), ("autoround", F16)])
def test_no_group_gets_worse_and_low_bits_get_better(num_bits: int, symmetric: bool, rule: str, scale_dtype: object) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_t(4, (64, 256)).astype(np.float32) * 0.02
    weight[3] = 0
    weight = weight.astype(ml_dtypes.bfloat16)
    scheme = Scheme(num_bits=num_bits, symmetric=symmetric, group_size=64, rule=rule, scale_dtype=scale_dtype)  # type: ignore[arg-type]
    backend = choose_backend("auto", scheme, BF16)
    plain, searched = backend.quantize(weight, scheme), quantize_searched(weight, replace(scheme, clip_search=True), backend)
    before, after = squared_error(weight, plain), squared_error(weight, searched)
    assert np.all(after <= before * (1 + 1e-4) + 1e-12)
    assert np.array_equal(searched.scale, searched.scale.astype(scale_dtype.numpy).astype(np.float32))  # type: ignore[attr-defined]
    if num_bits <= 4:
        assert after.sum() < 0.99 * before.sum()


def test_float_codes_have_no_scale_to_search() -> None:
    scheme = Scheme(type="fp8", clip_search=True)
    with pytest.raises(SpecError, match="clip_search"):
        quantize_searched(np.zeros((2, 2), np.float32), scheme, choose_backend("auto", replace(scheme, clip_search=False), BF16))

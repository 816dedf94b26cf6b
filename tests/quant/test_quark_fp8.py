"""FP8 by Quark's rule: what its exporter wrote, to the bit, from both backends."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import F32, dtype_of

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "matrices"


def arrays(name: str) -> dict[str, np.ndarray]:
    import torch

    found = {}
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118  # the file is no mapping
            tensor = file.get_tensor(key)
            if tensor.dtype == torch.bfloat16:
                found[key] = tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            elif tensor.dtype == torch.float8_e4m3fn:
                found[key] = tensor.view(torch.uint8).numpy()
            else:
                found[key] = tensor.numpy()
    return found


@pytest.mark.parametrize("name", ["fast", "torch"])
def test_codes_and_scales_are_those_of_quarks_exporter(name: str) -> None:
    source, golden = arrays("source"), arrays("quark-fp8-channel")
    matrices = {key.partition(".")[0] for key in golden}
    assert len(matrices) >= 3
    for matrix in matrices:
        weight = source[f"{matrix}.weight"]
        scheme = Scheme(type="fp8", num_bits=8, rule="quark", scale_dtype=F32)
        made = choose_backend(name, scheme, dtype_of(weight)).quantize(weight, scheme)
        assert np.array_equal(made.scale.reshape(-1), golden[f"{matrix}.weight_scale"].reshape(-1).astype(np.float32)), matrix
        assert np.array_equal(made.codes.view(np.uint8), golden[f"{matrix}.weight"]), matrix

"""Narrow floats as levels: the nearest one is chosen, GPTQ and polishing lower the error on them, and what is packed is what was
chosen."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorsurgeon.calibrate.codes.grids import LevelGrid, grid_of
from tensorsurgeon.quant.gptq.gptq import GptqOptions, gptq
from tensorsurgeon.quant.gptq.levels import E2M1, E4M3, EVEN, Spacing, code_dtype, nearest_levels
from tensorsurgeon.quant.gptq.polish import Polish
from tensorsurgeon.quant.gptq.scale_search import dequantize, round_to_nearest
from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F32

_E2M1_IN_HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)
_E4M3_VALUES = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
GRIDS: list[tuple[Spacing, float, np.ndarray]] = [
    (E2M1, 12.0, _E2M1_IN_HALVES),
    (E4M3, 448.0, _E4M3_VALUES),
    (EVEN, 127.0, np.arange(128, dtype=np.float32)),
]
SCHEMES = {
    "fp8-channel": Scheme(type="fp8", scale_dtype=BF16),
    "fp8-block": Scheme(type="fp8", block=(128, 128), scale_dtype=F32),
    "nvfp4": Scheme(type="nvfp4", num_bits=4, group_size=16),
    "mxfp4": Scheme(type="mxfp4", num_bits=4, group_size=32),
}


def nearest_in(table: np.ndarray, value: float) -> float:
    """By the table alone; ties go to the entry at an even place, and numbers beyond the last to the last."""
    distance = np.abs(table.astype(np.float64) - abs(value))
    places = np.flatnonzero(distance == distance.min())
    place = places[0] if len(places) == 1 else next(p for p in places if p % 2 == 0)
    return float(np.copysign(table[place], value))


@pytest.mark.parametrize(("spacing", "high", "table"), GRIDS, ids=["e2m1", "e4m3", "even"])
@given(value=st.floats(-600, 600, width=32) | st.floats(-0.03125, 0.03125, width=32) | st.floats(-14, 14, width=32))
def test_the_nearest_level_is_that_of_a_table(spacing: Spacing, high: float, table: np.ndarray, value: float) -> None:
    found = nearest_levels(torch.tensor([value]), -high, high, spacing).item()
    assert found == nearest_in(table, value)


@pytest.mark.parametrize(("spacing", "high", "table"), GRIDS, ids=["e2m1", "e4m3", "even"])
def test_ties_go_to_the_even_level(spacing: Spacing, high: float, table: np.ndarray) -> None:
    ties = (table[1:] + table[:-1]) / 2
    found = nearest_levels(torch.from_numpy(ties), -high, high, spacing).numpy()
    assert found.tolist() == [nearest_in(table, tie) for tie in ties]


def weight_of(rows: int = 256, columns: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight[3, :32] = 0.0
    weight[5, 7] = 20.0
    return weight.bfloat16().float()


def base_of(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    bf16 = weight.numpy().astype(ml_dtypes.bfloat16)
    return choose_backend("auto", scheme, BF16).quantize(bf16, scheme)


def packed(grid: LevelGrid, codes: torch.Tensor, scale: torch.Tensor, base: Quantized, scheme: Scheme) -> Quantized:
    stored, scales = grid.packed(codes, scale)
    array = stored.numpy().view(ml_dtypes.float8_e4m3fn) if scheme.type == "fp8" else stored.numpy()
    return base._replace(codes=array, scale=scales.numpy())


@pytest.mark.parametrize("name", SCHEMES)
def test_levels_of_rounding_to_nearest_pack_to_the_codes_they_came_from(name: str) -> None:
    scheme = SCHEMES[name]
    base = base_of(weight_of(), scheme)
    grid = grid_of(base, scheme)
    back = packed(grid, grid.codes, grid.scale, base, scheme)
    # A negative number that rounds to zero keeps its sign in a code, and may have none as a level.
    assert (dequantized(back, scheme) + 0.0).tobytes() == (dequantized(base, scheme) + 0.0).tobytes()
    assert back.scale.tobytes() == base.scale.tobytes()


def dequantized(made: Quantized, scheme: Scheme) -> np.ndarray:
    return choose_backend("auto", scheme, F32).dequantize(made, scheme, F32)


@pytest.mark.parametrize("name", SCHEMES)
def test_levels_nearest_to_a_weight_are_the_codes_of_rounding_to_nearest(name: str) -> None:
    scheme = SCHEMES[name]
    weight = weight_of()
    base = choose_backend("auto", scheme, F32).quantize(weight.numpy(), scheme)
    grid = grid_of(base, scheme)
    found = round_to_nearest(weight, grid.scale, None, qmin=grid.low, qmax=grid.high, spacing=grid.spacing)
    assert found.dtype == code_dtype(grid.low, grid.high, grid.spacing)
    assert torch.equal(found, grid.codes)


def chosen(weight: torch.Tensor, hessian: torch.Tensor, grid: LevelGrid, **options: Any) -> Any:
    return gptq(
        weight, hessian, scale=grid.scale, qmin=grid.low, qmax=grid.high, group_size=grid.group_size, spacing=grid.spacing,
        options=GptqOptions(**options), store_scale=grid.store_scale, keep_scales=grid.keep_scales,
    )  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_gptq_and_polishing_lower_the_error_of_rounding(name: str) -> None:
    scheme = SCHEMES[name]
    weight = weight_of()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2048, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    hessian = inputs.T @ inputs
    base = base_of(weight, scheme)
    grid = grid_of(base, scheme)

    def error(made: torch.Tensor) -> float:
        return float(((weight - made) @ inputs.T).square().sum())

    rounded = error(dequantize(grid.codes, grid.scale, None))
    plain = chosen(weight, hessian, grid, search=grid.search)
    polished = chosen(weight, hessian, grid, search=grid.search, polish=Polish())
    assert error(plain.dequantize()) < 0.9 * rounded
    assert error(polished.dequantize()) < error(plain.dequantize())
    # What is packed is what was chosen: the reader's values are those that the error was measured with.
    back = dequantized(packed(grid, polished.codes, polished.scale, base, scheme), scheme)
    np.testing.assert_allclose(back, polished.dequantize().numpy(), rtol=2e-7, atol=0)
    if grid.keep_scales:
        assert torch.equal(polished.scale, grid.scale)


@pytest.mark.parametrize(("spacing", "high", "table"), GRIDS, ids=["e2m1", "e4m3", "even"])
def test_compiled_loops_choose_the_levels_that_torch_does(spacing: Spacing, high: float, table: np.ndarray) -> None:
    """An identity for a Hessian: nothing is made up for, so that every column is rounded as it is."""
    weight = torch.cat([torch.linspace(-1.2 * high, 1.2 * high, 2001), torch.linspace(-0.04, 0.04, 1999)]).view(8, 500)
    scale = torch.ones(8, 1)
    made = gptq(
        weight, torch.eye(500), scale=scale, qmin=int(-high), qmax=int(high), group_size=-1, spacing=spacing,
        options=GptqOptions(search=None, damp_percent=0.0), store_scale=lambda scale: scale,
    )  # fmt: skip
    assert torch.equal(made.codes.float(), nearest_levels(weight, -high, high, spacing))

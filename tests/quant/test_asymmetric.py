"""Targets that lean towards the original inputs' outputs: sums, the closed form, and what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorsurgeon.errors import NumericError
from tensorsurgeon.quant.gptq.asymmetric import RIDGE, CrossAccumulator, correction, leaning
from tensorsurgeon.quant.gptq.card.factor import correction as on_card


def inputs(tokens: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What goes into a layer behind original ones, and behind quantized ones."""
    seeded = torch.Generator().manual_seed(seed)
    original = torch.randn(tokens, columns, generator=seeded) @ torch.randn(columns, columns, generator=seeded) / columns**0.5
    # Errors of layers before that are made of the same inputs, and some that are not.
    wrong = torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=seeded) / columns**0.5
    return original, original @ wrong + 0.05 * torch.randn(tokens, columns, generator=seeded)


def test_cross_products_are_exact_and_the_same_however_tokens_are_cut() -> None:
    original, quantized = (part.bfloat16() for part in inputs(1700, 96))
    made = []
    for sizes in ([1700], [1, 511, 512, 676], [300] * 5 + [200]):
        sums = CrossAccumulator(96)
        for now, before in zip(quantized.split(sizes), original.split(sizes), strict=True):
            sums.add(now[None], before[None])
        made.append(sums.result())
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    exact = (original.double() - quantized.double()).T @ quantized.double()
    torch.testing.assert_close(made[0].double(), exact, rtol=1e-4, atol=1e-3)


def test_inputs_of_other_tokens_are_refused() -> None:
    with pytest.raises(NumericError, match="not of the same tokens"):
        CrossAccumulator(8).add(torch.zeros(4, 8), torch.zeros(5, 8))


def test_the_closed_form_is_the_least_squares_solution() -> None:
    original, quantized = inputs(900, 64)
    hessian, cross = quantized.T @ quantized, (original - quantized).T @ quantized
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    step = correction(cross, hessian)
    assert step is not None
    made = leaning(weight, step, 0.5)
    x, o, w = quantized.double(), original.double(), weight.double()
    ridge = RIDGE * hessian.double().diagonal().mean() * torch.eye(64, dtype=torch.float64)
    wanted = (w @ (0.5 * o + 0.5 * x).T @ x + w @ ridge) @ torch.linalg.inv(x.T @ x + ridge)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-3, atol=1e-4)
    # It brings the layer's outputs nearer to the original ones, which a plain copy of the weight does not.
    apart = [float((w @ o.T - target.double() @ x.T).square().sum()) for target in (weight, made, leaning(weight, step, 1.0))]
    assert apart[2] < apart[1] < apart[0]


def test_without_errors_before_and_for_columns_that_saw_nothing_the_weight_stays() -> None:
    original, quantized = inputs(300, 32)
    original[:, 5] = quantized[:, 5] = 0
    hessian = quantized.T @ quantized
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    nothing = correction(torch.zeros(32, 32), hessian)
    assert nothing is not None
    assert torch.equal(leaning(weight, nothing, 1.0), weight)
    step = correction((original - quantized).T @ quantized, hessian)
    assert step is not None
    assert torch.equal(leaning(weight, step, 1.0)[:, 5], weight[:, 5])
    assert correction(torch.zeros(32, 32), torch.zeros(32, 32)) is None
    with pytest.raises(NumericError, match="not finite"):
        correction(torch.full((32, 32), torch.inf), hessian)


def test_many_at_once_are_each_as_alone() -> None:
    pairs = [inputs(500, 48, seed) for seed in range(3)]
    hessians = torch.stack([q.T @ q for _, q in pairs])
    crosses = torch.stack([(o - q).T @ q for o, q in pairs])
    made = on_card(crosses, hessians, [RIDGE, RIDGE, 0.5])
    for cross, hessian, step, ridge in zip(crosses, hessians, made, [RIDGE, RIDGE, 0.5], strict=True):
        alone = correction(cross, hessian, ridge)
        assert alone is not None
        torch.testing.assert_close(step, alone, rtol=1e-3, atol=1e-5)

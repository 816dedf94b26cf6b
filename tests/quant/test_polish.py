from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensorsurgeon.quant.gptq.polish import Polish, polish
from tensorsurgeon.quant.gptq.scale_search import dequantize, round_to_nearest
from tests.quant.damping import damp

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def f16(scale: Tensor) -> Tensor:
    return scale.half().float()


def bf16(scale: Tensor) -> Tensor:
    return scale.bfloat16().float()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated_hessian(in_features: int, seed: int) -> Tensor:
    generator = seeded(seed)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    spectrum = (1 + torch.arange(in_features, dtype=torch.float32)) ** -0.5
    tokens = torch.randn(3 * in_features, in_features, generator=generator) @ (spectrum[:, None] * mixing)
    return tokens.T @ tokens


def loss(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, hessian: Tensor) -> Tensor:
    """The diagonal of D H D^T, in F64."""
    off = (weight - dequantize(codes, scale, zero)).double()
    return ((off @ hessian.double()) * off).sum(1)


def rounded(
    rows: int, columns: int, group_size: int, seed: int, asymmetric: bool = False, store: Callable[[Tensor], Tensor] = f16
) -> Case:
    weight = torch.randn(rows, columns, generator=seeded(seed)) * 0.02
    width = columns if group_size == -1 else group_size
    groups = weight.unflatten(1, (-1, width))
    zero = None
    scale = store(groups.abs().amax(-1) / 7.5)
    if asymmetric:
        scale = store((groups.amax(-1) - groups.amin(-1)) / 15)
        zero = (-8 - groups.amin(-1) / scale).round().clamp(-8, 7)
    codes = round_to_nearest(weight, scale, zero, qmin=-8, qmax=7)
    return weight, correlated_hessian(columns, seed + 1), codes, scale, zero


def damping_of(hessian: Tensor) -> Tensor:
    return (damp(hessian, 0.01) - hessian).diagonal().clone()


@given(
    shape=st.sampled_from([(70, 256, 32), (9, 130, 10), (33, 320, 160), (20, 300, -1), (5, 96, 96), (64, 288, 48)]),
    asymmetric=st.booleans(), seed=st.integers(0, 1000), rounds=st.integers(1, 3), sweeps=st.integers(1, 2),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_no_row_is_worse_on_the_damped_hessian_and_the_gain_told_is_the_gain(
    shape: tuple[int, int, int], asymmetric: bool, seed: int, rounds: int, sweeps: int
) -> None:
    weight, hessian, codes, scale, zero = rounded(*shape, seed, asymmetric)
    damping = damping_of(hessian)
    found = polish(
        weight, hessian, codes, scale, zero, damping=damping, qmin=-8, qmax=7, group_size=shape[2], store_scale=f16,
        options=Polish(rounds=rounds, sweeps=sweeps),
    )  # fmt: skip
    damped = hessian + torch.diag(damping)
    before, after = loss(weight, codes, scale, zero, damped), loss(weight, found.codes, found.scale, zero, damped)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.8 * before.sum()
    fall = loss(weight, codes, scale, zero, hessian) - loss(weight, found.codes, found.scale, zero, hessian)
    assert torch.allclose(found.row_gain, fall, rtol=1e-3, atol=1e-5 * float(before.max()))
    assert found.codes.dtype == codes.dtype
    assert found.codes.min() >= -8
    assert found.codes.max() <= 7
    assert torch.equal(found.scale, f16(found.scale))


@pytest.mark.parametrize(("rows", "group_size"), [(16, 32), (16, -1), (1, 32)])
def test_nothing_given_is_changed(rows: int, group_size: int) -> None:
    weight, hessian, codes, scale, zero = rounded(rows, 128, group_size, 1)
    copies = [tensor.clone() for tensor in (weight, hessian, codes, scale)]
    polish(
        weight, hessian, codes, scale, zero, damping=damping_of(hessian), qmin=-8, qmax=7, group_size=group_size, store_scale=f16
    )
    assert all(torch.equal(now, then) for now, then in zip((weight, hessian, codes, scale), copies, strict=True))


def test_a_second_round_gains_less_but_never_loses() -> None:
    weight, hessian, codes, scale, zero = rounded(64, 256, 64, 1)
    damping = damping_of(hessian)
    losses = [
        loss(weight, found.codes, found.scale, zero, hessian + torch.diag(damping)).sum()
        for rounds in (1, 2, 3, 6)
        for found in [
            polish(
                weight, hessian, codes, scale, zero, damping=damping, qmin=-8, qmax=7, group_size=64, store_scale=f16,
                options=Polish(rounds=rounds),
            )
        ]
    ]  # fmt: skip
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[1] > losses[1] - losses[2]


def test_the_best_codes_of_a_small_row_by_brute_force_are_within_reach() -> None:
    # Two columns: coordinate descent ends where no single change helps; compare with all 16 x 16 pairs of codes.
    hessian = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    weight = torch.randn(200, 2, generator=seeded(3)) * 0.02
    scale = torch.full((200, 1), 0.007)
    start = torch.zeros(200, 2, dtype=torch.int8)
    found = polish(
        weight, hessian, start, scale, damping=torch.zeros(2), qmin=-8, qmax=7, group_size=-1, options=Polish(rounds=4, sweeps=4),
        store_scale=lambda _: torch.full((200,), float("nan")),
    )  # fmt: skip
    assert torch.equal(found.scale, scale)
    every = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    best = torch.stack([loss(weight, pair.expand(200, -1), scale, None, hessian) for pair in every]).amin(0)
    reached = loss(weight, found.codes, scale, None, hessian)
    assert (reached <= best * 1.001 + 1e-12).double().mean() > 0.9


def test_scales_reach_the_least_squares_solution_where_codes_need_not_move() -> None:
    # Weights that are exactly codes times another scale than the one given: only the scale is wrong.
    codes = torch.randint(-7, 8, (12, 64), generator=seeded(1)).to(torch.int8)
    true_scale = torch.full((12, 2), 0.01)
    weight = dequantize(codes, true_scale, None)
    found = polish(
        weight, torch.eye(64), codes, true_scale * 1.03, damping=torch.zeros(64), qmin=-8, qmax=7, group_size=32,
        store_scale=lambda scale: scale,
    )  # fmt: skip
    assert torch.allclose(found.scale, true_scale, rtol=1e-4)
    assert torch.equal(found.codes, codes)


@pytest.mark.parametrize(
    "store",
    [lambda s: s * float("nan"), lambda s: -s, lambda s: s * 0, lambda s: s * float("inf")],
    ids=["nan", "sign", "zero", "inf"],
)
@pytest.mark.parametrize("group_size", [32, -1])
def test_a_scale_that_cannot_be_stored_or_changes_sign_is_not_taken(store: Callable[[Tensor], Tensor], group_size: int) -> None:
    weight, hessian, codes, scale, zero = rounded(16, 256, group_size, 1)
    scale[::2] *= -1
    codes[::2] = -codes[::2]
    codes.clamp_(-8, 7)
    found = polish(
        weight,
        hessian,
        codes,
        scale,
        zero,
        damping=damping_of(hessian),
        qmin=-8,
        qmax=7,
        group_size=group_size,
        store_scale=store,
    )
    assert torch.equal(found.scale, scale)
    assert not torch.equal(found.codes, codes)


def test_bfloat16_scales_stay_bfloat16() -> None:
    weight, hessian, codes, scale, zero = rounded(64, 256, 32, 1, store=bf16)
    found = polish(
        weight, hessian, codes, scale, zero, damping=damping_of(hessian), qmin=-8, qmax=7, group_size=32, store_scale=bf16
    )
    assert torch.equal(found.scale, bf16(found.scale))
    assert found.row_gain.sum() > 0


def test_an_identity_hessian_leaves_nearest_codes_at_their_scales() -> None:
    weight, _, codes, scale, _ = rounded(32, 128, 32, 1)
    found = polish(
        weight,
        torch.eye(128),
        codes,
        scale,
        damping=torch.zeros(128),
        qmin=-8,
        qmax=7,
        group_size=32,
        store_scale=lambda _: scale[:, 0] * 0,
    )
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.row_gain, torch.zeros(32, dtype=torch.float64))


def test_a_scale_keeps_its_sign_where_the_opposite_sign_would_fit_best() -> None:
    codes = torch.randint(-7, 8, (12, 64), generator=seeded(1)).to(torch.int8)
    scale = torch.full((12, 2), 0.01)
    weight = dequantize(codes, scale, None)
    found = polish(
        weight,
        torch.eye(64),
        -codes,
        scale,
        damping=torch.zeros(64),
        qmin=-8,
        qmax=7,
        group_size=32,
        store_scale=lambda s: s,
    )
    assert (found.scale > 0).all()
    assert torch.equal(found.codes, codes)

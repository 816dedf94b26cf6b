from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensorsurgeon.errors import NumericError
from tensorsurgeon.quant.gptq import hessian as module
from tensorsurgeon.quant.gptq.hessian import (
    CHUNK_TOKENS,
    HessianAccumulator,
    damp_for_tokens,
    flipped_cholesky,
    visiting_order,
)
from tests.quant.damping import damp


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tokens(tokens: int, in_features: int, seed: int = 0) -> Tensor:
    mixing = torch.randn(in_features, in_features, generator=seeded(99)) / in_features**0.5
    return torch.randn(tokens, in_features, generator=seeded(seed)) @ mixing


def accumulate(tokens: Tensor, cuts: list[int]) -> HessianAccumulator:
    accumulator = HessianAccumulator(tokens.shape[1])
    for start, stop in zip([0, *cuts], [*cuts, tokens.shape[0]], strict=True):
        accumulator.add(tokens[start:stop])
    return accumulator


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_bits_of_the_sums_do_not_depend_on_how_tokens_were_batched(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 3 * CHUNK_TOKENS))
    tokens = random_tokens(count, 24)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=6)))
    batched, whole = accumulate(tokens, cuts), accumulate(tokens, [])
    assert torch.equal(batched.result(), whole.result())
    assert batched.tokens == count


@pytest.mark.parametrize("in_features", [1, 24, 300, 700])
def test_sum_of_outer_products_is_right_and_exactly_symmetric(in_features: int) -> None:
    tokens = random_tokens(1300, in_features)
    found = accumulate(tokens, [200, 900]).result()
    wanted = tokens.double().T @ tokens.double()
    assert torch.equal(found, found.T)
    assert (found - wanted).abs().max() <= 3e-6 * wanted.abs().max()


def test_reading_a_sum_does_not_disturb_it() -> None:
    tokens = random_tokens(1100, 24)
    accumulator = HessianAccumulator(24)
    accumulator.add(tokens[:700])
    early = accumulator.result()
    early_copy = early.clone()
    accumulator.add(tokens[700:])
    assert torch.equal(early, early_copy)
    assert torch.equal(early, accumulate(tokens[:700], []).result())
    assert torch.equal(accumulator.result(), accumulate(tokens, []).result())


def test_bfloat16_inputs_with_leading_axes_are_summed_in_f32() -> None:
    tokens = random_tokens(600, 24).bfloat16()
    accumulator = HessianAccumulator(24)
    accumulator.add(tokens.reshape(2, 300, 24))
    assert torch.equal(accumulator.result(), accumulate(tokens.float(), []).result())


def test_inputs_of_the_wrong_width_are_refused() -> None:
    with pytest.raises(NumericError, match="23 features, the layer takes 24"):
        HessianAccumulator(24).add(torch.zeros(3, 23))


def test_bits_of_sum_and_factor_do_not_depend_on_the_number_of_threads() -> None:
    # From about 2,048 terms on MKL splits a product between threads, where it may.
    tokens = random_tokens(1500, 2048)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            if threads > 1:
                assert torch.get_num_threads() == threads
            hessian = accumulate(tokens, []).result()
            factor = flipped_cholesky(hessian, 0.01)
            assert factor is not None
            results.append((hessian, factor.lower))
    finally:
        torch.set_num_threads(before)
    for hessian, lower in results[1:]:
        assert torch.equal(hessian, results[0][0])
        assert torch.equal(lower, results[0][1])


def test_damp_adds_a_share_of_the_mean_diagonal_and_gives_dead_columns_the_mean() -> None:
    hessian = torch.diag(torch.tensor([1.0, 0.0, 3.0]))
    assert torch.allclose(damp(hessian, 0.1), torch.diag(torch.tensor([1.2, 2.0, 3.2])))
    assert torch.equal(hessian, torch.diag(torch.tensor([1.0, 0.0, 3.0])))


@pytest.mark.parametrize("act_order", ["static", "none"])
@pytest.mark.parametrize("in_features", [1, 5, 128, 129, 400])
def test_factor_times_its_transpose_is_the_damped_hessian_in_visiting_order(in_features: int, act_order: str) -> None:
    tokens = random_tokens(3 * in_features, in_features)
    hessian = tokens.T @ tokens
    factor = flipped_cholesky(hessian, 0.01, act_order)  # type: ignore[arg-type]
    assert factor is not None
    order = visiting_order(hessian.diagonal(), act_order).flip(0)  # type: ignore[arg-type]
    wanted = damp(hessian, 0.01)[order][:, order].double()
    lower = factor.lower.double()
    assert torch.equal(factor.order, order)
    assert torch.equal(lower, torch.tril(lower))
    assert (lower @ lower.T - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    # U = the flipped factor is upper and GPTQ's factor of the inverse is U^-1.
    upper = lower.flip(0, 1)
    inverse = torch.linalg.inv(wanted.flip(0, 1))
    textbook = torch.linalg.cholesky(inverse, upper=True)
    assert torch.allclose(torch.linalg.inv(upper), textbook, rtol=1e-3, atol=1e-4 * float(textbook.abs().max()))
    assert torch.allclose(factor.column_cost()[order].double(), lower.diagonal().square())


def test_most_used_columns_come_first_and_equal_ones_in_their_order() -> None:
    assert visiting_order(torch.tensor([1.0, 3.0, 3.0, 2.0]), "static").tolist() == [1, 2, 3, 0]
    assert visiting_order(torch.tensor([1.0, 3.0, 3.0, 2.0]), "none").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("tokens", [1, 4, 100, 255])
def test_damping_grows_until_a_hessian_without_full_rank_factors(tokens: int) -> None:
    few = random_tokens(tokens, 256)
    factor = flipped_cholesky(few.T @ few, 0.0)
    assert factor is not None
    assert 0 < factor.damp_percent <= 0.01
    damped = damp(few.T @ few, factor.damp_percent)[factor.order][:, factor.order].double()
    lower = factor.lower.double()
    assert (lower @ lower.T - damped).abs().max() <= 1e-5 * damped.abs().max()


def test_damping_that_suffices_is_left_alone() -> None:
    tokens = random_tokens(2000, 64)
    factor = flipped_cholesky(tokens.T @ tokens, 0.0)
    assert factor is not None
    assert factor.damp_percent == 0.0


def test_no_tokens_have_no_factor() -> None:
    assert flipped_cholesky(torch.zeros(8, 8), 0.01) is None


def test_a_matrix_that_is_no_hessian_is_refused_however_it_is_damped() -> None:
    with pytest.raises(NumericError, match="no Cholesky factor"):
        flipped_cholesky(torch.tensor([[1.0, 1e4], [1e4, 1.0]]), 0.01)
    with pytest.raises(NumericError, match="symmetric"):
        flipped_cholesky(torch.tensor([[1.0, 5e3], [0.0, 1.0]]), 0.01)
    with pytest.raises(NumericError, match=r"negative diagonal entry -1\.0 at column 1"):
        flipped_cholesky(torch.diag(torch.tensor([1.0, -1.0])), 0.01)
    with pytest.raises(NumericError, match="2 entries that are not finite"):
        flipped_cholesky(torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]), 0.01)
    with pytest.raises(NumericError, match="square F32"):
        flipped_cholesky(torch.zeros(2, 3), 0.01)


def test_a_finite_factor_that_is_garbage_is_noticed_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(600, 64)

    def corrupt(matrix: Tensor) -> bool:
        sound = honest(matrix)
        matrix[40, 3] += 10 * float(matrix[40, 40])
        return sound

    honest = module._factor_in_place
    monkeypatch.setattr(module, "_factor_in_place", corrupt)
    with pytest.raises(NumericError, match="no Cholesky factor"):
        flipped_cholesky(tokens.T @ tokens, 0.01)


def test_few_tokens_raise_the_damping_and_many_leave_it() -> None:
    assert damp_for_tokens(0.01, None, 512) == 0.01
    assert damp_for_tokens(0.01, 0, 512) == 0.01
    assert damp_for_tokens(0.01, 1024, 512) == 0.01
    assert damp_for_tokens(0.01, 512, 512) == pytest.approx(0.04)
    assert damp_for_tokens(0.01, 256, 512) == pytest.approx(0.16)
    assert damp_for_tokens(0.01, 1, 512) == pytest.approx(1.0)


def test_pivots_of_rounding_noise_count_as_failures() -> None:
    # One column is a third of another: its pivot is rounding noise, positive about as often as not.
    for seed in range(20):
        tokens = random_tokens(300, 16, seed)
        tokens[:, 3] = tokens[:, 11] / 3
        factor = flipped_cholesky(tokens.T @ tokens, 0.0)
        assert factor is not None
        assert factor.damp_percent > 0

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensorsurgeon.errors import NumericError
from tensorsurgeon.quant.gptq.gptq import GptqOptions, GptqResult, gptq
from tensorsurgeon.quant.gptq.hessian import visiting_order
from tensorsurgeon.quant.gptq.polish import Polish
from tensorsurgeon.quant.gptq.scale_search import ScaleSearch, dequantize, round_to_nearest, search_scale
from tests.quant.damping import damp

PLAIN = GptqOptions(search=None)


def f16(scale: Tensor) -> Tensor:
    return scale.half().float()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated_tokens(in_features: int, tokens: int, seed: int) -> Tensor:
    """The yardsticks' input (docs: engines): falling spectrum, mixed channels, 8 of them ten times louder."""
    noise = torch.randn(tokens, in_features, generator=seeded(seed))
    mixing = torch.randn(in_features, in_features, generator=seeded(1001)) / in_features**0.5
    spectrum = (1 + torch.arange(in_features, dtype=torch.float32)) ** -0.5
    spectrum /= spectrum.square().mean().sqrt()
    result = noise @ (spectrum[:, None] * mixing)
    result[:, torch.randperm(in_features, generator=seeded(1002))[:8]] *= 10
    return result


def hessian_of(tokens: Tensor) -> Tensor:
    return tokens.T @ tokens


def random_weight(out_features: int, in_features: int, seed: int) -> Tensor:
    generator = seeded(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    weight[:, torch.randperm(in_features, generator=generator)[:4]] *= 8
    return weight.bfloat16().float()


def base_scale(weight: Tensor, group_size: int, num_bits: int = 4) -> Tensor:
    width = weight.shape[1] if group_size == -1 else group_size
    return weight.unflatten(1, (-1, width)).abs().amax(-1) / (2 ** (num_bits - 1) - 0.5)


def grid(num_bits: int = 4, group_size: int = 128) -> dict[str, Any]:
    half = 2 ** (num_bits - 1)
    return {"qmin": -half, "qmax": half - 1, "group_size": group_size, "store_scale": f16}


def error(weight: Tensor, dequantized: Tensor, hessian: Tensor) -> float:
    off, exact, original = (weight - dequantized).double(), hessian.double(), weight.double()
    return float(((off @ exact) * off).sum() / ((original @ exact) * original).sum())


def textbook_gptq(
    weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor | None, qmin: int, qmax: int, order: Tensor
) -> tuple[Tensor, Tensor]:
    """The slow oracle: Frantar et al., algorithm 1, one column at a time, the inverse formed, in F64.

    Codes, and the levels that were rounded to them, both in natural column order.
    """
    width = weight.shape[1] // scale.shape[1]
    inverse = torch.linalg.inv(damp(hessian, 0.01)[order][:, order].double())
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = weight[:, order].double()
    codes = torch.empty(weight.shape, dtype=torch.int16)
    levels = torch.empty(weight.shape, dtype=torch.float64)
    for step, column in enumerate(order.tolist()):
        size = scale[:, column // width].double()
        shift = zero[:, column // width].double() if zero is not None else torch.zeros_like(size)
        levels[:, column] = left[:, step] / size + shift
        code = levels[:, column].round().clamp(qmin, qmax)
        off = (left[:, step] - (code - shift) * size) / upper[step, step]
        left[:, step:] -= off[:, None] * upper[step, step:]
        codes[:, column] = code.to(torch.int16)
    return codes, levels


def assert_codes_part_only_at_ties(codes: Tensor, oracle: Tensor, levels: Tensor, order: Tensor) -> None:
    """F32 may round a tie the other way, after which that row goes its own way: all but such rows are equal.

    (F32 textbook code parts from the F64 oracle in about ten times as many rows as ours does.)
    """
    parted = (codes != oracle)[:, order]
    rows = parted.any(1).nonzero().flatten()
    first = order[parted.double().argmax(1)[rows]]
    distance_to_tie = (levels[rows, first] - levels[rows, first].floor() - 0.5).abs()
    assert (distance_to_tie < 1e-3).all()
    assert len(rows) <= 1 + 0.02 * codes.shape[0]


@pytest.mark.parametrize("act_order", ["static", "none"])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(96, 256, 32), (64, 384, 128), (48, 200, -1), (33, 130, 10)])
def test_codes_are_those_of_the_textbook_column_by_column(rows: int, columns: int, group_size: int, act_order: Any) -> None:
    weight = random_weight(rows, columns, rows)
    hessian = hessian_of(correlated_tokens(columns, 3 * columns, 5))
    scale = f16(base_scale(weight, group_size))
    result = gptq(
        weight, hessian, scale=scale, options=GptqOptions(search=None, act_order=act_order), **grid(group_size=group_size)
    )
    order = visiting_order(hessian.diagonal(), act_order)
    oracle, levels = textbook_gptq(weight, hessian, scale, None, -8, 7, order)
    assert_codes_part_only_at_ties(result.codes, oracle, levels, order)
    oracle_error = error(weight, dequantize(oracle, scale, None), hessian)
    assert error(weight, result.dequantize(), hessian) == pytest.approx(oracle_error, rel=1e-3)
    assert result.relative_loss == pytest.approx(oracle_error, rel=2e-3)


def test_asymmetric_codes_are_those_of_the_textbook_and_keep_their_zero_points() -> None:
    weight = random_weight(64, 256, 3) + 0.01
    low, high = (weight.unflatten(1, (-1, 64)).amin(-1), weight.unflatten(1, (-1, 64)).amax(-1))
    scale = f16((high - low) / 15)
    zero = (-8 - low / scale).round().clamp(-8, 7)
    hessian = hessian_of(correlated_tokens(256, 800, 5))
    result = gptq(weight, hessian, scale=scale, zero_point=zero.to(torch.int8), options=PLAIN, **grid(group_size=64))
    order = visiting_order(hessian.diagonal(), "static")
    oracle, levels = textbook_gptq(weight, hessian, scale, zero, -8, 7, order)
    assert_codes_part_only_at_ties(result.codes, oracle, levels, order)
    nearest = dequantize(round_to_nearest(weight, scale, zero, qmin=-8, qmax=7), scale, zero)
    assert error(weight, result.dequantize(), hessian) < 0.6 * error(weight, nearest, hessian)


def test_negative_scales_of_autorounds_grid_are_used_as_they_are() -> None:
    weight = random_weight(64, 256, 3)
    groups = weight.unflatten(1, (-1, 64))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = f16(torch.where(high >= -low, -high, -low) / 8)
    assert (scale < 0).any()
    assert (scale > 0).any()
    hessian = hessian_of(correlated_tokens(256, 800, 5))
    plain = gptq(weight, hessian, scale=scale, options=PLAIN, **grid(group_size=64))
    better = gptq(weight, hessian, scale=scale, options=GptqOptions(polish=Polish()), **grid(group_size=64))
    assert torch.equal(plain.scale, scale)
    assert torch.equal(better.scale.sign(), scale.sign())
    assert better.loss < plain.loss


@given(
    rows=st.integers(1, 70), groups=st.integers(1, 5), width=st.sampled_from([1, 8, 32, 48]), num_bits=st.integers(2, 8),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_identity_hessian_gives_exactly_round_to_nearest(rows: int, groups: int, width: int, num_bits: int, seed: int) -> None:
    weight = torch.randn(rows, groups * width, generator=seeded(seed))
    scale = base_scale(weight, width, num_bits)
    options = GptqOptions(search=None, block_size=32)
    result = gptq(weight, torch.eye(weight.shape[1]), scale=scale, options=options, **grid(num_bits, width))
    nearest = round_to_nearest(weight, f16(scale), None, qmin=-(2 ** (num_bits - 1)), qmax=2 ** (num_bits - 1) - 1)
    assert torch.equal(result.codes, nearest)
    assert result.method == "gptq"


def test_a_large_matrix_has_999_of_1000_codes_and_the_loss_of_the_textbook() -> None:
    weight, hessian = random_weight(512, 512, 512), hessian_of(correlated_tokens(512, 1536, 5))
    scale, order = f16(base_scale(weight, 128)), visiting_order(hessian.diagonal(), "static")
    result = gptq(weight, hessian, scale=scale, options=PLAIN, **grid())
    oracle, _ = textbook_gptq(weight, hessian, scale, None, -8, 7, order)
    assert (result.codes == oracle).double().mean() >= 0.999
    assert result.relative_loss == pytest.approx(error(weight, dequantize(oracle, scale, None), hessian), rel=1e-3)


def test_block_size_changes_rounding_ties_at_most() -> None:
    weight, hessian = random_weight(64, 300, 1), hessian_of(correlated_tokens(300, 900, 2))
    codes = [
        gptq(weight, hessian, scale=base_scale(weight, 100), options=GptqOptions(search=None, block_size=b), **grid(4, 100)).codes
        for b in (1, 7, 128, 1000)
    ]
    assert all((other == codes[0]).double().mean() > 0.999 for other in codes[1:])


@pytest.mark.parametrize("weight_seed", [10, 0])
def test_yardstick_errors_hold_on_calibration_and_fresh_tokens(weight_seed: int) -> None:
    # The targets of the yardstick, for rows that are independent of each other: 192 of them instead of 1,024.
    weight = random_weight(192, 2048, weight_seed)
    hessian, fresh = (hessian_of(correlated_tokens(2048, count, seed)) for count, seed in ((4096, 1000), (4096, 777)))
    scale = base_scale(weight, 128)

    def errors(options: GptqOptions) -> tuple[float, float]:
        result = gptq(weight, hessian, scale=scale, options=options, tokens=4096, **grid())
        return error(weight, result.dequantize(), hessian), error(weight, result.dequantize(), fresh)

    plain = errors(GptqOptions(search=None, measure_energy=False))
    searched = errors(GptqOptions(measure_energy=False))
    polished = errors(GptqOptions(polish=Polish(), measure_energy=False))
    assert plain[0] <= 0.0042
    assert plain[1] <= 0.0058
    assert searched[0] <= 0.0035
    assert searched[1] <= 0.0047
    assert polished[0] <= 0.0028
    assert polished[1] <= 0.0042


@pytest.mark.parametrize("polish", [None, Polish()])
def test_bits_do_not_depend_on_the_number_of_threads(polish: Polish | None) -> None:
    weight, hessian = random_weight(160, 2048, 1), hessian_of(correlated_tokens(2048, 3000, 2))

    def run(threads: int) -> GptqResult:
        torch.set_num_threads(threads)
        return gptq(weight, hessian, scale=base_scale(weight, 128), options=GptqOptions(polish=polish), **grid())

    before = torch.get_num_threads()
    try:
        one, two, three = run(1), run(2), run(3)
    finally:
        torch.set_num_threads(before)
    for other in (two, three):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale, other.scale)
        assert one.loss == other.loss
        assert one.relative_loss == other.relative_loss


@pytest.mark.parametrize("polish", [None, Polish()])
def test_matrices_stacked_as_rows_get_what_each_gets_alone(polish: Polish | None) -> None:
    weights = [random_weight(96, 256, seed) for seed in range(13)]
    hessian = hessian_of(correlated_tokens(256, 700, 2))
    scales = [base_scale(weight, 64) for weight in weights]
    options = GptqOptions(polish=polish)
    stacked = gptq(torch.cat(weights), hessian, scale=torch.cat(scales), options=options, tokens=700, **grid(4, 64))
    for index in (0, 5, 12):
        rows = slice(index * 96, index * 96 + 96)
        alone = gptq(weights[index], hessian, scale=scales[index], options=options, tokens=700, **grid(4, 64))
        assert (stacked.codes[rows] == alone.codes).double().mean() > 0.999
        assert float(stacked.row_loss[rows].sum()) == pytest.approx(alone.loss, rel=1e-3)


def test_no_tokens_means_round_to_nearest_and_the_result_says_so() -> None:
    weight = random_weight(32, 128, 1)
    result = gptq(weight, torch.zeros(128, 128), scale=base_scale(weight, 32), options=PLAIN, tokens=0, **grid(4, 32))
    nearest = round_to_nearest(weight, f16(base_scale(weight, 32)), None, qmin=-8, qmax=7)
    assert result.method == "rtn"
    assert result.relative_loss is None
    assert torch.equal(result.codes, nearest)
    searched = gptq(weight, torch.zeros(128, 128), scale=base_scale(weight, 32), **grid(4, 32))
    assert (searched.dequantize() - weight).square().sum() <= (result.dequantize() - weight).square().sum()


def test_columns_without_input_are_rounded_to_nearest_not_zeroed() -> None:
    weight = random_weight(64, 256, 1)
    tokens = correlated_tokens(256, 600, 3)
    dead = torch.tensor([0, 17, 100, 255])
    tokens[:, dead] = 0
    result = gptq(weight, hessian_of(tokens), scale=base_scale(weight, 64), options=PLAIN, **grid(4, 64))
    nearest = round_to_nearest(weight, f16(base_scale(weight, 64)), None, qmin=-8, qmax=7)
    assert torch.equal(result.codes[:, dead], nearest[:, dead])
    polished = gptq(weight, hessian_of(tokens), scale=base_scale(weight, 64), options=GptqOptions(polish=Polish()), **grid(4, 64))
    off = (polished.dequantize() - weight)[:, dead].abs()
    assert (
        off
        <= 0.51 * polished.scale.abs()[:, dead // 64] + (weight[:, dead].abs() - 7 * polished.scale[:, dead // 64]).clamp(min=0)
    ).all()


@pytest.mark.parametrize("damp_percent", [0.0, 0.01])
@pytest.mark.parametrize("tokens", [1, 4, 100])
@pytest.mark.parametrize("polish", [None, Polish()])
def test_few_tokens_never_give_garbage(tokens: int, damp_percent: float, polish: Polish | None) -> None:
    weight, inputs = random_weight(64, 256, 1), correlated_tokens(256, tokens, 3)
    scale = base_scale(weight, 64)
    options = GptqOptions(search=None, damp_percent=damp_percent, polish=polish)
    result = gptq(weight, hessian_of(inputs), scale=scale, options=options, tokens=tokens, **grid(4, 64))
    nearest = dequantize(round_to_nearest(weight, f16(scale), None, qmin=-8, qmax=7), f16(scale), None)
    assert torch.isfinite(result.dequantize()).all()
    assert error(weight, result.dequantize(), hessian_of(inputs)) < error(weight, nearest, hessian_of(inputs))
    fresh = hessian_of(correlated_tokens(256, 4096, 4))
    assert error(weight, result.dequantize(), fresh) < 1.15 * error(weight, nearest, fresh)


def test_one_token_repeated_is_a_hessian_of_rank_one() -> None:
    weight = random_weight(64, 256, 1)
    token = torch.randn(1, 256, generator=seeded(4))
    hessian = hessian_of(token.expand(500, -1))
    result = gptq(
        weight, hessian, scale=base_scale(weight, 64), options=GptqOptions(damp_percent=0.0, polish=Polish()), **grid(4, 64)
    )
    assert result.damp_percent > 0
    assert torch.isfinite(result.dequantize()).all()
    assert result.relative_loss is not None
    assert result.relative_loss < 1e-3


def test_knowing_that_tokens_are_few_lowers_the_error_on_fresh_ones() -> None:
    weight, few = random_weight(64, 512, 1), correlated_tokens(512, 128, 3)
    fresh = hessian_of(correlated_tokens(512, 4096, 4))
    options = GptqOptions(polish=Polish())
    unknown, known = (
        error(
            weight,
            gptq(weight, hessian_of(few), scale=base_scale(weight, 128), options=options, tokens=t, **grid()).dequantize(),
            fresh,
        )
        for t in (None, 128)
    )
    assert known < 0.85 * unknown


def test_a_group_of_zeros_gives_zeros() -> None:
    weight = random_weight(16, 128, 1)
    weight[3, 32:64] = 0
    weight[5] = 0
    hessian = hessian_of(correlated_tokens(128, 300, 3))
    result = gptq(weight, hessian, scale=base_scale(weight, 32), options=GptqOptions(polish=Polish()), **grid(4, 32))
    assert torch.equal(result.dequantize()[3, 32:64], torch.zeros(32))
    assert torch.equal(result.dequantize()[5], torch.zeros(128))
    assert torch.isfinite(result.dequantize()).all()


def test_eight_bit_unsigned_codes_need_int16() -> None:
    weight, hessian = random_weight(16, 64, 1), hessian_of(correlated_tokens(64, 300, 3))
    zero = torch.full((16, 2), 128)
    scale = base_scale(weight, 32, 8)
    result = gptq(
        weight, hessian, scale=scale, zero_point=zero, qmin=0, qmax=255, group_size=32, store_scale=f16,
        options=GptqOptions(polish=Polish()),
    )  # fmt: skip
    assert result.codes.dtype == torch.int16
    assert result.codes.max() > 127
    assert error(weight, result.dequantize(), hessian) < 1e-4


@pytest.mark.parametrize("where", ["weight", "hessian", "scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(where: str, value: float) -> None:
    weight = random_weight(16, 64, 1)
    case = {"weight": weight, "hessian": hessian_of(correlated_tokens(64, 300, 3)), "scale": base_scale(weight, 32)}
    case[where][1, 1] = value
    with pytest.raises(NumericError, match=f"(?i){where}.*not finite"):
        gptq(case["weight"], case["hessian"], scale=case["scale"], **grid(4, 32))


def test_a_scale_that_the_format_cannot_hold_is_refused() -> None:
    with pytest.raises(NumericError, match="does not fit"):
        gptq(torch.full((2, 8), 1e6), torch.eye(8), scale=torch.full((2, 1), 1e6), options=PLAIN, **grid(4, -1))


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight = random_weight(16, 64, 1)
    with pytest.raises(NumericError, match="does not divide"):
        gptq(weight, torch.eye(64), scale=base_scale(weight, 32), **grid(4, 48))
    with pytest.raises(NumericError, match="input columns"):
        gptq(weight, torch.eye(32), scale=base_scale(weight, 32), **grid(4, 32))


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_searched_scale_is_the_best_candidate_by_brute_force(num_bits: int, group_size: int) -> None:
    weight, base = random_weight(24, 64, 1), base_scale(random_weight(24, 64, 1), group_size, num_bits)
    importance = torch.rand(64, generator=seeded(2)).square()
    options = ScaleSearch()
    found = search_scale(weight, base, importance=importance, options=options, **grid(num_bits, group_size))

    def cost(scale: Tensor) -> Tensor:
        codes = round_to_nearest(weight, scale, None, qmin=-(2 ** (num_bits - 1)), qmax=2 ** (num_bits - 1) - 1)
        off = (weight - dequantize(codes, scale, None)).double().square() * importance
        return off.unflatten(1, (base.shape[1], -1)).sum(-1)

    best = torch.stack([cost(f16(base * ratio)) for ratio in options.ratios()]).amin(0)
    assert torch.allclose(cost(found), best, rtol=1e-4)
    assert cost(found).sum() < cost(f16(base)).sum()


def test_search_leaves_the_base_scale_where_nothing_is_used() -> None:
    weight = random_weight(24, 64, 1)
    found = search_scale(weight, base_scale(weight, 32), importance=torch.zeros(64), **grid(4, 32))
    assert torch.equal(found, f16(base_scale(weight, 32)))


def test_search_passes_over_candidates_that_overflow_the_stored_type() -> None:
    weight = torch.full((2, 8), 64000.0 * 7)
    found = search_scale(weight, torch.full((2, 1), 64000.0), **grid(4, 8))
    assert torch.isfinite(found).all()


def test_asymmetric_search_lowers_the_error() -> None:
    weight = random_weight(24, 64, 1) + 0.02
    low, high = weight.unflatten(1, (-1, 32)).amin(-1), weight.unflatten(1, (-1, 32)).amax(-1)
    scale = f16((high - low) / 15)
    zero = (-8 - low / scale).round().clamp(-8, 7)
    found = search_scale(weight, scale, zero, **grid(4, 32))
    costs = [
        (weight - dequantize(round_to_nearest(weight, s, zero, qmin=-8, qmax=7), s, zero)).square().sum() for s in (scale, found)
    ]
    assert costs[1] < 0.97 * costs[0]

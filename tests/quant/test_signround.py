"""SignRound on one matrix: where it starts, what a step does, and that its gradients are those of straight-through rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorsurgeon.errors import RecipeError
from tensorsurgeon.quant.gptq.scale_search import dequantize
from tensorsurgeon.quant.signround.offsets import Codes, Offsets
from tensorsurgeon.quant.signround.options import RECIPES, SignRound, recipe_named

ROWS, COLUMNS, GROUP = 12, 64, 16


def bf16(scale: Tensor) -> Tensor:
    return scale.to(torch.bfloat16).float()


def some_codes(bits: int, *, zero_points: bool, signed: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Codes]:
    """A weight, and codes that no rounding of it would give: up to two steps off."""
    torch.manual_seed(bits)
    weight = torch.randn(ROWS, COLUMNS).to(dtype)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    grouped = weight.float().view(ROWS, -1, GROUP)
    scale = bf16(grouped.abs().amax(2) / (high + 0.5))
    if signed:
        scale *= torch.where(grouped.sum(2) > 0, -1.0, 1.0)
    zero = torch.randint(low + 1, high, scale.shape).to(torch.int8) if zero_points else None
    level = weight.float() / scale.repeat_interleave(GROUP, 1) + torch.randint(-2, 3, weight.shape)
    if zero is not None:
        level += zero.repeat_interleave(GROUP, 1)
    return weight, Codes(level.round().clamp(low, high).to(torch.int8), scale, zero)


def begun(weight: Tensor, start: Codes, bits: int, options: SignRound | None = None) -> Offsets:
    return Offsets(weight, start, num_bits=bits, store_scale=bf16, options=options or SignRound())


KINDS = [
    pytest.param({"zero_points": False, "signed": False}, id="symmetric"),
    pytest.param({"zero_points": False, "signed": True}, id="signed"),
    pytest.param({"zero_points": True, "signed": False}, id="zero points"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_with_the_very_codes_that_are_there(kind: dict[str, bool], bits: int, dtype: torch.dtype) -> None:
    weight, start = some_codes(bits, dtype=dtype, **kind)
    made = begun(weight, start, bits).made()
    assert torch.equal(made.codes, start.codes)
    assert torch.equal(made.scale, start.scale)
    assert (made.zero_point is None) == (start.zero_point is None)
    if made.zero_point is not None and start.zero_point is not None:
        assert torch.equal(made.zero_point, start.zero_point)


def straight(value: Tensor) -> Tensor:
    return value + (value.round() - value).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_go_against_the_sign_that_autograd_has_for_the_same_function(kind: dict[str, bool]) -> None:
    bits = 3
    weight, start = some_codes(bits, **kind)
    low, high = -4, 3
    options = SignRound(steps=10, rate=0.01, range_rate=0.001)
    offsets = begun(weight, start, bits, options)
    wanted = torch.randn(ROWS, COLUMNS)

    # The same, as autograd has it, with offsets that begin where those do.
    shift = offsets._offset.clone().requires_grad_()
    upper, lower = (torch.ones_like(start.scale).requires_grad_() for _ in range(2))
    zero = torch.zeros_like(start.scale) if start.zero_point is None else start.zero_point.float()
    above, below = upper * (high - zero) / (high - low), lower * (zero - low) / (high - low)
    if start.zero_point is None:
        scale, moved = start.scale * upper, zero
    else:
        scale, moved = start.scale * (above + below), low + straight((high - low) * below / (above + below))
    scale = scale + (bf16(scale) - scale).detach()

    def wide(value: Tensor) -> Tensor:
        return value.repeat_interleave(GROUP, 1)

    level = (straight(weight / wide(scale) + shift) + wide(moved)).clamp(low, high)
    made = (level - wide(moved)) * wide(scale)
    slope = torch.autograd.grad((made - wanted).square().sum(), made, retain_graph=True)[0]
    gradients = torch.autograd.grad((made - wanted).square().sum(), [shift, upper, lower], allow_unused=True)

    before = offsets._offset.clone()
    offsets.step(slope, 0)
    assert torch.equal(dequantize(*start), made.detach()) or torch.allclose(dequantize(*start), made.detach(), atol=1e-6)
    assert torch.equal((before - offsets._offset).sign(), gradients[0].sign())
    assert torch.equal((1 - offsets._upper).sign(), gradients[1].sign())
    if offsets._lower is not None:
        assert torch.equal((1 - offsets._lower).sign(), gradients[2].sign())


@pytest.mark.parametrize("kind", KINDS)
def test_steps_lower_an_error_and_stay_on_the_grid(kind: dict[str, bool]) -> None:
    """Rounding to the nearest is what the plain error wants, and codes two steps off come back to it."""
    bits = 4
    weight, start = some_codes(bits, **kind)
    options = SignRound(steps=200, rate=0.02, range_rate=0.002)
    offsets = begun(weight, start, bits, options)
    first = (dequantize(*start) - weight).square().sum()
    for step in range(200):
        offsets.step(dequantize(*offsets.made()) - weight, step)
    made = offsets.made()
    assert (dequantize(*made) - weight).square().sum() < 0.5 * first
    assert int(made.codes.min()) >= -8
    assert int(made.codes.max()) <= 7
    assert torch.equal(bf16(made.scale), made.scale)
    assert torch.equal(made.scale.sign(), start.scale.sign())
    if made.zero_point is not None:
        assert int(made.zero_point.min()) >= -8
        assert int(made.zero_point.max()) <= 7


def test_groups_that_are_all_zero_and_scales_that_vanish_are_left_alone() -> None:
    weight = torch.zeros(2, GROUP)
    start = Codes(torch.zeros(2, GROUP, dtype=torch.int8), torch.tensor([[0.0], [1e-38]]), None)
    offsets = Offsets(weight, start, num_bits=4, store_scale=lambda s: s.half().float(), options=SignRound())
    for step in range(3):
        offsets.step(torch.randn(2, GROUP), step)
    made = offsets.made()
    assert torch.isfinite(dequantize(*made)).all()
    assert torch.equal(made.scale, start.scale)


def test_from_rounding_offsets_stay_within_half_a_code() -> None:
    weight, start = some_codes(4, zero_points=False, signed=True)
    rounded = Codes((weight / start.scale.repeat_interleave(GROUP, 1)).round().clamp(-8, 7).to(torch.int8), *start[1:])
    offsets = begun(weight, rounded, 4, SignRound(steps=10, rate=0.4, start="rtn"))
    for _ in range(5):
        offsets.step(torch.ones_like(weight), 0)
    assert float(offsets._offset.abs().max()) == 0.5


def test_recipes_are_autorounds_numbers() -> None:
    """auto_round/cli/main.py and algorithms/quantization/sign_round/config.py of 0.16.1."""
    default, best, light = (RECIPES[name] for name in ("autoround", "autoround-best", "autoround-light"))
    assert (default.steps, default.batch, default.rates(4, 0)) == (200, 8, (1 / 200, 1 / 200))
    assert (best.steps, best.rates(4, 0), best.rates(3, 0)) == (1000, (1 / 1000, 1 / 1000), (2 / 1000, 2 / 1000))
    assert (light.steps, light.rates(2, 0)) == (50, (0.005, 0.005))
    assert default.rates(4, 100) == (0.5 / 200, 0.5 / 200)
    assert {default.start, best.start, light.start} == {"rtn"}
    assert recipe_named("autoround:400").rates(4, 0) == (1 / 400, 1 / 400)


@pytest.mark.parametrize(
    ("text", "said"), [("autorond", "did you mean 'autoround'"), ("default:0", "positive number"), ("default:x", "found 'x'")]
)
def test_what_is_no_recipe_is_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_named(text)


def test_checks_are_spread_and_the_last_step_is_one() -> None:
    options = SignRound(steps=40, checks=2)
    assert [step for step in range(40) if options.is_check(step)] == [19, 39]
    assert [step for step in range(3) if SignRound(steps=3, checks=9).is_check(step)] == [0, 1, 2]

"""The batched form of GPTQ for a card against the form for the CPU: one algorithm, sums in another order.

Without a card its loops run in plain torch, and as the card's own Triton kernels, interpreted, where Triton is installed.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorsurgeon.errors import NumericError
from tensorsurgeon.quant.gptq.card.factor import factor
from tensorsurgeon.quant.gptq.card.gptq import Grid, dequantize, gptq_batch, round_to_nearest
from tensorsurgeon.quant.gptq.gptq import GptqOptions, gptq, output_energy
from tensorsurgeon.quant.gptq.hessian import flipped_cholesky
from tensorsurgeon.quant.gptq.polish import Polish
from tensorsurgeon.quant.gptq.scale_search import ScaleSearch

HAS_CARD = torch.cuda.is_available()
FORMS = ["torch", "triton", "card"]


def bf16(scale: Tensor) -> Tensor:
    return scale.bfloat16().float()


@pytest.fixture(params=FORMS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "card":
        if not HAS_CARD:
            pytest.skip("needs a CUDA device")
        return torch.device("cuda")
    if request.param == "triton":
        if HAS_CARD or find_spec("triton") is None:
            pytest.skip("needs Triton, and no CUDA device")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return torch.device("cpu")


def problem(batch: int, rows: int, columns: int, tokens: int = 900, seed: int = 0) -> tuple[Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(seed)
    mixing = torch.randn(batch, columns, columns, generator=seeded) / columns**0.5
    spread = torch.exp(torch.randn(batch, 1, columns, generator=seeded) * 0.7)
    inputs = (torch.randn(batch, tokens, columns, generator=seeded) @ mixing) * spread
    weight = torch.randn(batch, rows, columns, generator=seeded) * 0.02
    return weight.bfloat16().float(), inputs.mT @ inputs


def base(weight: Tensor, group_size: int, bits: int, symmetric: bool | str) -> tuple[Tensor, Tensor | None]:
    groups = weight.view(*weight.shape[:2], -1, weight.shape[2] if group_size == -1 else group_size)
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if symmetric == "signed":
        extreme = groups.gather(3, groups.abs().argmax(3, keepdim=True))[..., 0]
        return bf16(extreme / qmin), None
    if symmetric:
        return bf16(groups.abs().amax(3) / ((qmax - qmin) / 2)), None
    low, high = groups.amin(3).clamp(max=0), groups.amax(3).clamp(min=0)
    scale = bf16((high - low) / (qmax - qmin))
    return scale, (qmin - low / scale).round().clamp(qmin, qmax)


def loss_of(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, hessian: Tensor) -> float:
    change = weight - dequantize(codes, scale, zero)
    return float(torch.stack([output_energy(c, h).sum() for c, h in zip(change, hessian, strict=True)]).sum())


CASES = [
    # batch, rows, columns, group, bits, symmetric, options
    (2, 40, 256, 128, 4, True, GptqOptions(polish=Polish())),
    (1, 70, 256, 128, 4, True, GptqOptions(polish=Polish())),
    (2, 33, 256, 32, 4, True, GptqOptions(polish=Polish())),
    (2, 20, 256, -1, 8, True, GptqOptions(polish=Polish())),
    (2, 20, 256, 64, 3, False, GptqOptions(polish=Polish())),
    (1, 20, 320, 64, 4, False, GptqOptions(polish=Polish(), act_order="none")),
    (2, 33, 256, 32, 4, "signed", GptqOptions(polish=Polish())),
    (2, 20, 256, 64, 3, "signed", GptqOptions(polish=Polish())),
    (3, 17, 192, 96, 4, True, GptqOptions(search=None)),
    (2, 12, 48, 16, 4, True, GptqOptions(search=ScaleSearch(steps=5))),
]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda c: f"{c[0]}x{c[1]}x{c[2]}-g{c[3]}-{c[4]}bit-{c[5] if c[5] == 'signed' else 'sym' if c[5] else 'asym'}",
)
def test_the_batched_form_gives_the_codes_and_losses_of_the_form_for_the_cpu(case: Any, device: torch.device) -> None:
    batch, rows, columns, group_size, bits, symmetric, options = case
    weight, hessian = problem(batch, rows, columns)
    scale, zero = base(weight, group_size, bits, symmetric)
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    grid = Grid(qmin=qmin, qmax=qmax, group_size=group_size, store_scale=bf16)
    made = gptq_batch(
        weight.to(device), hessian.to(device), scale=scale.to(device), zero_point=None if zero is None else zero.to(device),
        damp_percent=torch.full((batch,), 0.01, dtype=torch.float64, device=device), grid=grid, options=options,
    )  # fmt: skip
    codes, scales = made.codes.cpu(), made.scale.cpu()
    theirs, equal = 0.0, []
    for b in range(batch):
        one = gptq(
            weight[b], hessian[b], scale=scale[b], zero_point=None if zero is None else zero[b], qmin=qmin, qmax=qmax,
            group_size=group_size, options=options, store_scale=bf16,
            factor=flipped_cholesky(hessian[b], 0.01, options.act_order),
        )  # fmt: skip
        theirs += one.loss
        equal.append(float((one.codes == codes[b]).double().mean()))
        assert float(made.energy[b].sum()) == pytest.approx(float(output_energy(weight[b], hessian[b]).sum()), rel=1e-4)
    assert min(equal) > 0.95, equal
    exact = loss_of(weight, codes, scales, zero, hessian)
    assert exact == pytest.approx(theirs, rel=0.01)
    assert float(made.loss.sum()) == pytest.approx(exact, rel=2e-3)
    assert torch.equal(scales, bf16(scales))
    assert torch.equal(scales.sign(), scale.sign())
    assert int(codes.min()) >= qmin
    assert int(codes.max()) <= qmax


def test_a_batch_gives_each_matrix_what_it_gets_in_another_batch(device: torch.device) -> None:
    """Which matrices go together is fixed by the model, yet nothing of one may leak into another."""
    weight, hessian = problem(3, 24, 256)
    scale, _ = base(weight, 64, 4, symmetric=True)
    grid = Grid(qmin=-8, qmax=7, group_size=64, store_scale=bf16)

    def run(some: list[int]) -> Tensor:
        made = gptq_batch(
            weight[some].to(device), hessian[some].to(device), scale=scale[some].to(device), zero_point=None,
            damp_percent=torch.full((len(some),), 0.01, dtype=torch.float64, device=device), grid=grid,
            options=GptqOptions(polish=Polish()),
        )  # fmt: skip
        return made.codes.cpu()

    together, turned = run([0, 1, 2]), run([2, 0, 1])
    assert (together == turned[[1, 2, 0]]).double().mean() > 0.999


def test_factors_are_those_of_the_cpu_and_damping_grows_where_it_must(device: torch.device) -> None:
    few = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    _, full = problem(1, 1, 64)
    hessian = torch.stack([few.T @ few, full[0], torch.diag(torch.arange(64.0))])
    found = factor(hessian.to(device), torch.zeros(3, dtype=torch.float64, device=device), "static")
    for b in range(3):
        one = flipped_cholesky(hessian[b], 0.0)
        assert one is not None
        assert torch.equal(found.order[b].cpu(), one.order)
        assert float(found.damp_percent[b]) == pytest.approx(one.damp_percent)
        assert torch.allclose(found.lower[b].cpu(), one.lower, rtol=1e-2, atol=1e-3 * float(one.lower.abs().max()))
    bad, damping = torch.tensor([[[1.0, 1e4], [1e4, 1.0]]], device=device), torch.full((1,), 0.01, device=device).double()
    with pytest.raises(NumericError, match="no Cholesky factor"):
        factor(bad, damping, "static")


def test_rounding_to_nearest_is_that_of_the_cpu(device: torch.device) -> None:
    from tensorsurgeon.quant.gptq import scale_search

    weight, _ = problem(2, 30, 128)
    for symmetric in (True, False):
        scale, zero = base(weight, 32, 4, symmetric)
        grid = Grid(qmin=-8, qmax=7, group_size=32, store_scale=bf16)
        made = round_to_nearest(weight.to(device), scale.to(device), None if zero is None else zero.to(device), grid).cpu()
        for b in range(2):
            one = scale_search.round_to_nearest(weight[b], scale[b], None if zero is None else zero[b], qmin=-8, qmax=7)
            assert torch.equal(one, made[b])

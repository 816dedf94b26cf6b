"""Calibration as it works on a card, run in plain torch where there is none: the same work, and the same promises."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorsurgeon.calibrate import driver, run
from tensorsurgeon.calibrate.card import budget, experts
from tensorsurgeon.calibrate.card.budget import CardPlan
from tensorsurgeon.calibrate.log import LOG_NAME, read_log
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.run import CalibratedResult, run_calibrated
from tensorsurgeon.calibrate.state import CalibrationState, Reached
from tensorsurgeon.errors import BudgetError, JournalError, NumericError
from tensorsurgeon.quant.signround.options import SignRound
from tests.calibrate.models import comparable, options_of, plan_of
from tests.checkpoints import FIXTURE, read_all

CARD = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's way of working, whatever the device."""
    monkeypatch.setattr(run, "works_on_card", lambda device: True)
    # Few tokens are cut all the same.
    monkeypatch.setattr(driver, "BATCH_TOKENS", 512)
    monkeypatch.setattr(experts, "WINDOW_TOKENS", 200)


def calibrate(target: Path, options: CalibrationOptions, **fields: Any) -> CalibratedResult:
    running = {key: fields.pop(key) for key in ("workers", "max_gpu_ram_bytes", "resume") if key in fields}
    return run_calibrated(plan_of(FIXTURE, **fields), target, options, device=CARD, **{"workers": 2, **running})


def on_cpu(target: Path, options: CalibrationOptions, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "works_on_card", lambda device: False)
        run_calibrated(plan_of(FIXTURE, **fields), target, options, workers=2)


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"gptq": CalibrationOptions.default_gptq()}, {}),
    ({"expert_hessian": "own", "experts": "routed"}, {"group_size": -1}),
    ({"experts": "all", "fallback_tokens": 200}, {"symmetric": False}),
    ({"minimum_tokens": 100, "sequential": False}, {"method": "imatrix"}),
    # Three bits: targets lean towards the original layers' outputs, which are carried along.
    ({"gptq": CalibrationOptions.default_gptq()}, {"num_bits": 3}),
    ({"asymmetric": 1.0, "expert_hessian": "own"}, {"num_bits": 3, "symmetric": False}),
]


@pytest.mark.parametrize(
    ("options", "fields"),
    [pytest.param(*case, marks=[] if number in (0, 5) else pytest.mark.slow) for number, case in enumerate(CASES)],
    ids=lambda case: "-".join(case) or "default",
)
def test_codes_and_losses_are_those_of_the_cpu_within_rounding(
    options: dict[str, Any], fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options_of(samples=8, sequence_length=64, **options)
    calibrate(tmp_path / "card", asked, **fields)
    on_cpu(tmp_path / "cpu", asked, monkeypatch, **fields)
    ours, theirs = (read_log(tmp_path / name / LOG_NAME) for name in ("card", "cpu"))
    assert [(r.module, r.method, r.expert) for r in ours] == [(r.module, r.method, r.expert) for r in theirs]
    # Later layers see what other codes made of the text, and a router may send a token elsewhere.
    seen = [[(r.tokens, r.note) for r in rows if r.layer == 0] for rows in (ours, theirs)]
    assert seen[0] == seen[1]
    means = [sum(r.relative_loss or 0.0 for r in rows) / len(rows) for rows in (ours, theirs)]
    assert means[0] == pytest.approx(means[1], rel=0.02)
    one, other = read_all(tmp_path / "card"), read_all(tmp_path / "cpu")
    assert one.keys() == other.keys()
    first = [name for name in one if ".layers.0." in name and name.endswith(("weight_packed", "weight"))]
    equal = [float((one[name].view("u1") == other[name].view("u1")).mean()) for name in first]
    assert sum(equal) / len(equal) > 0.9


@pytest.mark.slow
def test_neither_workers_nor_where_things_lie_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(samples=8, sequence_length=64)
    plans = [CardPlan("card", "card", 0), CardPlan("pinned", "pinned", 0), CardPlan("disk", "disk", 0)]
    for number, place in enumerate(plans):
        monkeypatch.setattr(run, "plan_card", lambda *_, place=place: place)
        calibrate(tmp_path / str(number), options, workers=1 + number)
    made = [comparable(tmp_path / str(number)) for number in range(len(plans))]
    assert all(other == made[0] for other in made[1:])


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(samples=8, sequence_length=64)
    calibrate(tmp_path / "whole", options)

    class Stopped(Exception):
        pass

    advance = CalibrationState.advance

    def stopping(self: CalibrationState, reached: Reached, *rest: Any) -> Reached:
        made = advance(self, reached, *rest)
        if made.layer == 2:
            raise Stopped
        return made

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationState, "advance", stopping)
        with pytest.raises(Stopped):
            calibrate(tmp_path / "out", options)
    copy = shutil.copytree(tmp_path / "out", tmp_path / "damaged")
    calibrate(tmp_path / "out", options, resume=True)
    assert comparable(tmp_path / "out") == comparable(tmp_path / "whole")
    states = copy / ".surgeon" / "hidden-00002.bin"
    raw = bytearray(states.read_bytes())
    raw[99] ^= 1
    states.write_bytes(raw)
    calibrate(copy, options, resume=True)
    assert comparable(copy) == comparable(tmp_path / "whole")


def test_a_run_does_not_resume_on_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise NumericError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationState, "advance", broken)
        with pytest.raises(NumericError, match="on purpose"):
            calibrate(tmp_path / "out", options_of())
    monkeypatch.setattr(run, "identity_of", lambda device: "cuda: another card")
    with pytest.raises(JournalError, match="another"):
        calibrate(tmp_path / "out", options_of(), resume=True)


def test_kept_statistics_are_those_that_were_used(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    calibrate(tmp_path / "live", options_of(sequential=False, write_statistics=kept))
    reading = CalibrationOptions(read_statistics=kept, gptq=options_of().gptq)
    calibrate(tmp_path / "stored", reading)
    live, stored = ({r.module: r.relative_loss for r in read_log(tmp_path / n / LOG_NAME)} for n in ("live", "stored"))
    assert live.keys() == stored.keys()
    assert sum(filter(None, live.values())) == pytest.approx(sum(filter(None, stored.values())), rel=0.01)


def test_a_card_too_small_is_refused_with_the_number_to_give(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"more than max_gpu_ram 1\.00 MB; give at least \d+MB"):
        calibrate(tmp_path / "out", options_of(), max_gpu_ram_bytes=1_000_000)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_the_card_lies_beside_it(tmp_path: Path) -> None:
    model = run.StreamedModel(plan_of(FIXTURE).source)
    device = torch.device("cpu")
    shape = (1 << 16, 1024, 256)
    least = budget.plan_card(model, (1, 64, 256), device, None).nbytes
    states = shape[0] * shape[1] * shape[2] * 2
    places = []
    for room in (4 * states, 2 * states, states // 2):
        plan = budget.plan_card(model, shape, device, least + room)
        places.append((plan.states, plan.inputs))
        assert plan.nbytes <= least + room
    assert places[0] == ("card", "card")
    assert places[1][0] != "card"
    assert places[1][1] == "card"
    assert places[2][1] != "card"


def test_layers_are_tuned_as_on_the_cpu_and_the_same_in_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options_of(samples=16, sequence_length=64, signround=SignRound(steps=4))
    for name in ("card", "again"):
        calibrate(tmp_path / name, asked, method="signround", num_bits=3)
    on_cpu(tmp_path / "cpu", asked, monkeypatch, method="signround", num_bits=3)
    assert comparable(tmp_path / "card") == comparable(tmp_path / "again")
    rows = [{row.layer: row for row in read_log(tmp_path / name / LOG_NAME)} for name in ("card", "cpu")]
    for layer in range(4):
        errors = [[float(number) for number in re.findall(r"error (\S+), (\S+) at", of[layer].note)[0]] for of in rows]
        assert all(after < before for before, after in errors), errors
        assert errors[0] == pytest.approx(errors[1], rel=0.1)

"""Calibrated runs end to end: what is written, and that nothing else decides it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tensorsurgeon.calibrate.log import LOG_NAME, LogRow, read_log
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.run import CalibratedResult, run_calibrated
from tensorsurgeon.calibrate.walk.walk import Walk
from tensorsurgeon.errors import BudgetError, JournalError, NumericError, RecipeError
from tensorsurgeon.quant.gptq.gptq import GptqOptions
from tensorsurgeon.quant.gptq.polish import Polish
from tests.calibrate.commands import assert_finite
from tests.calibrate.models import comparable, options_of, plan_of
from tests.checkpoints import FIXTURE, apply, read_all


def calibrate(source: Path, target: Path, options: CalibrationOptions, **fields: Any) -> CalibratedResult:
    running = {key: fields.pop(key) for key in ("workers", "max_ram_bytes", "resume", "overwrite") if key in fields}
    return run_calibrated(plan_of(source, **fields), target, options, **{"workers": 2, **running})


def losses(rows: list[LogRow]) -> dict[str, float]:
    return {row.module: row.relative_loss for row in rows if row.relative_loss is not None}


def test_workers_and_memory_change_no_byte(tmp_path: Path) -> None:
    options = options_of(samples=40, sequence_length=96, gptq=GptqOptions(polish=Polish()))
    calibrate(FIXTURE, tmp_path / "one", options, workers=1)
    calibrate(FIXTURE, tmp_path / "three", options, workers=3, max_ram_bytes=80 << 20)
    assert comparable(tmp_path / "one") == comparable(tmp_path / "three")


def test_fused_and_per_expert_checkpoints_give_the_same_codes(split_checkpoint: Path, tmp_path: Path) -> None:
    calibrate(FIXTURE, tmp_path / "fused", options_of())
    calibrate(split_checkpoint, tmp_path / "split", options_of())
    fused, split = read_all(tmp_path / "fused"), read_all(tmp_path / "split")
    packed = [name for name in fused if name.endswith(("weight_packed", "weight_scale"))]
    assert len(packed) > 200
    assert all(fused[name].tobytes() == split[name].tobytes() for name in packed)


def test_calibrated_codes_lose_less_than_rounding_and_their_loss_is_on_record(tmp_path: Path) -> None:
    options = options_of(samples=24, sequence_length=128)
    result = calibrate(FIXTURE, tmp_path / "gptq", options)
    rows = read_log(tmp_path / "gptq" / LOG_NAME)
    starved = options_of(samples=24, sequence_length=128, fallback_tokens=10**9)
    calibrate(FIXTURE, tmp_path / "rtn", starved)
    rounded = losses(read_log(tmp_path / "rtn" / LOG_NAME))
    chosen = losses(rows)
    assert result.summary["methods"] == {"gptq": 127}
    assert chosen.keys() == rounded.keys()
    assert sum(chosen.values()) < 0.7 * sum(rounded.values())
    experts = [row for row in rows if row.expert is not None]
    assert len(experts) == 4 * 8 * 3
    assert {row.expert for row in experts} == set(range(8))
    assert all(row.tokens >= 512 for row in rows)


def test_rounding_for_want_of_tokens_gives_what_rtn_gives(tmp_path: Path) -> None:
    result = calibrate(FIXTURE, tmp_path / "starved", options_of(fallback_tokens=10**9))
    apply(list(plan_of(FIXTURE, method="rtn", signed=True).steps), FIXTURE, tmp_path / "rtn", workers=1)
    starved, rtn = read_all(tmp_path / "starved"), read_all(tmp_path / "rtn")
    assert all(starved[name].tobytes() == rtn[name].tobytes() for name in rtn)
    assert result.summary["methods"] == {"rtn": 127}
    assert set(result.summary["rtn_reasons"]) == {"saw fewer than 1000000000 calibration tokens"}
    assert result.summary["cold_experts"] == 96


def test_weights_outside_the_decoder_layers_are_rounded_and_said_so(tmp_path: Path) -> None:
    plan = plan_of(FIXTURE, where=["{path*}.layers.{n}.{module*}.weight", "lm_head.weight"])
    run_calibrated(plan, tmp_path / "out", options_of(), workers=2)
    last = read_log(tmp_path / "out" / LOG_NAME)[-1]
    assert (last.module, last.method, last.layer) == ("lm_head", "rtn", None)
    assert "outside the decoder layers" in last.note


def test_what_is_not_quantized_passes_through_untouched(tmp_path: Path) -> None:
    calibrate(FIXTURE, tmp_path / "out", options_of())
    source, out = read_all(FIXTURE), read_all(tmp_path / "out")
    kept = [name for name in out if name in source]
    assert any(name.startswith("mtp.") for name in kept)
    assert any("visual" in name for name in kept)
    assert all(out[name].tobytes() == source[name].tobytes() for name in kept)


@pytest.mark.parametrize(
    "fields", [{"layout": "ct-int", "num_bits": 8, "group_size": -1}, {"symmetric": False}, {"group_size": -1}]
)
def test_other_grids_are_calibrated_too(fields: dict[str, Any], tmp_path: Path) -> None:
    result = calibrate(FIXTURE, tmp_path / "out", options_of(), **fields)
    assert result.summary["methods"] == {"gptq": 127}
    assert_finite(tmp_path / "out", tmp_path / "back")


def test_imatrix_weighs_its_scale_search_by_the_diagonal(tmp_path: Path) -> None:
    options = options_of(samples=24, sequence_length=128)
    result = calibrate(FIXTURE, tmp_path / "imatrix", options, method="imatrix")
    calibrate(FIXTURE, tmp_path / "rtn", options_of(samples=24, sequence_length=128, fallback_tokens=10**9))
    searched, rounded = (losses(read_log(tmp_path / name / LOG_NAME)) for name in ("imatrix", "rtn"))
    assert result.summary["methods"] == {"imatrix": 127}
    assert sum(searched.values()) < sum(rounded.values())


def test_stored_statistics_give_the_codes_of_the_walk_that_wrote_them(tmp_path: Path) -> None:
    options = options_of(sequential=False, write_statistics=tmp_path / "s")
    calibrate(FIXTURE, tmp_path / "live", options)
    reading = CalibrationOptions(read_statistics=tmp_path / "s", gptq=GptqOptions())
    calibrate(FIXTURE, tmp_path / "stored", reading)
    live, stored = read_all(tmp_path / "live"), read_all(tmp_path / "stored")
    assert all(live[name].tobytes() == stored[name].tobytes() for name in live)
    # Another bit width, no other pass over the text.
    result = calibrate(FIXTURE, tmp_path / "other", reading, num_bits=3, group_size=128)
    assert result.summary["methods"] == {"gptq": 127}


def test_sequential_layers_see_what_quantized_ones_put_out(tmp_path: Path) -> None:
    for sequential in (True, False):
        calibrate(FIXTURE, tmp_path / str(sequential), options_of(sequential=sequential), num_bits=3)
    one, other = read_all(tmp_path / "True"), read_all(tmp_path / "False")
    first = "model.language_model.layers.0.linear_attn.in_proj_qkv.weight_packed"
    later = "model.language_model.layers.1.linear_attn.in_proj_qkv.weight_packed"
    assert one[first].tobytes() == other[first].tobytes()
    assert one[later].tobytes() != other[later].tobytes()


_KILLED = """
import sys, threading
from pathlib import Path
from tests.calibrate.models import comparable, options_of, plan_of
from tensorsurgeon.calibrate.run import run_calibrated
run_calibrated(plan_of(Path(sys.argv[1])), sys.argv[2], options_of(samples=40), workers=2, resume=len(sys.argv) > 3)
"""


def test_a_killed_run_resumes_at_its_layer_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate(FIXTURE, tmp_path / "whole", options_of(samples=40))
    target = tmp_path / "killed"
    command = [sys.executable, "-c", _KILLED, str(FIXTURE), str(target)]
    environment = {**os.environ, "PYTHONPATH": str(FIXTURE.parents[1])}
    state = target / ".surgeon" / "calibration.json"
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if state.exists() and json.loads(state.read_bytes())["layer"] >= 2:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait()
    assert state.exists(), "the run ended before it could be killed"
    began_at = json.loads(state.read_bytes())["layer"]
    assert began_at >= 2
    layers = []
    original = Walk.run_layer

    def counted(self: Walk, number: int, *args: Any, **kwargs: Any) -> None:
        layers.append(number)
        original(self, number, *args, **kwargs)

    monkeypatch.setattr(Walk, "run_layer", counted)
    calibrate(FIXTURE, target, options_of(samples=40), resume=True)
    assert set(layers) == set(range(began_at, 4))
    assert comparable(target) == comparable(tmp_path / "whole")


def test_a_run_does_not_resume_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Walk, number: int, *args: Any, **kwargs: Any) -> None:
        raise NumericError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "run_layer", broken)
        with pytest.raises(NumericError, match="on purpose"):
            calibrate(FIXTURE, tmp_path / "out", options_of())
    with pytest.raises(JournalError, match="another"):
        calibrate(FIXTURE, tmp_path / "out", options_of(seed=1), resume=True)
    calibrate(FIXTURE, tmp_path / "out", options_of(), resume=True)
    assert not (tmp_path / "out" / ".surgeon").exists()


def test_the_record_names_the_data(tmp_path: Path) -> None:
    calibrate(FIXTURE, tmp_path / "out", options_of(seed=3))
    record = json.loads((tmp_path / "out" / "surgeon.json").read_text())["calibration"]
    assert record["options"]["seed"] == 3
    assert record["sources"][0]["name"] == "calibration.txt"
    assert record["sources"][0]["digest"].startswith("xxh3_128:")
    assert record["tokens"] == [6, 64]


def test_a_transform_that_asks_for_no_statistics_takes_no_data(tmp_path: Path) -> None:
    plan = plan_of(FIXTURE, method="rtn")
    assert not plan.needs_codes
    with pytest.raises(RecipeError, match="leave calibration away"):
        run_calibrated(plan, tmp_path / "out", options_of())


def test_a_memory_cap_below_one_layer_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"a decoder layer and its codes at once.*give at least \d+MB"):
        calibrate(FIXTURE, tmp_path / "out", options_of(), max_ram_bytes=1_000_000)
    assert not (tmp_path / "out").exists()


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RecipeError, match="calibration needs data"):
        CalibrationOptions()
    with pytest.raises(RecipeError, match="samples must be at least 1"):
        options_of(samples=0)
    with pytest.raises(RecipeError, match="did you mean 'balanced'"):
        options_of(experts="balancd")


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RecipeError, match=r"pip install 'tensorsurgeon\[calibrate\]'"):
        calibrate(FIXTURE, tmp_path / "out", options_of())

"""Runs whose layers are tuned: never further from the original's output, the same bytes whoever computes, resumed, read back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tensorsurgeon.calibrate.log import LOG_NAME, LogRow, read_log
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.run import CalibratedResult, run_calibrated
from tensorsurgeon.calibrate.walk.slopes import slopes_of
from tensorsurgeon.errors import BudgetError, RecipeError
from tensorsurgeon.quant.signround.options import RECIPES, SignRound, recipe_named
from tensorsurgeon.running.run import run_plan
from tests.calibrate.commands import FEW, record, refused, surgeon
from tests.calibrate.models import TEXT, comparable, options_of, plan_of, save_random, write_ids
from tests.checkpoints import FIXTURE, read_all

FAST = SignRound(steps=4, batch=8, checks=2)
_ERRORS = re.compile(r"error ([0-9.e-]+), ([0-9.e-]+) at step (\d+) of")


def tune(
    target: Path, source: Path = FIXTURE, *locations: Path, plan: dict[str, Any] | None = None, **fields: Any
) -> CalibratedResult:
    running = {key: fields.pop(key) for key in ("workers", "max_ram_bytes", "resume") if key in fields}
    given = {"samples": 64, "sequence_length": 64, "signround": FAST, **fields}
    made = plan_of(source, **{"method": "signround", "num_bits": 3, **(plan or {})})
    return run_calibrated(made, target, options_of(*locations, **given), **{"workers": 2, **running})


def errors_by_layer(target: Path) -> dict[int, tuple[float, float]]:
    """The layer's error before and after, as the log's notes have it."""
    found: dict[int, tuple[float, float]] = {}
    for row in read_log(target / LOG_NAME):
        match = _ERRORS.search(row.note)
        if match and row.layer is not None:
            assert found.setdefault(row.layer, (float(match[1]), float(match[2]))) == (float(match[1]), float(match[2]))
    return found


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    tune(folder / "out")
    return folder / "out"


def test_every_layer_ends_nearer_to_the_originals_output_and_the_log_says_by_how_much(tuned: Path, tmp_path: Path) -> None:
    errors = errors_by_layer(tuned)
    assert set(errors) == {0, 1, 2, 3}
    assert all(after < before for before, after in errors.values())
    rows = read_log(tuned / LOG_NAME)
    assert {row.method for row in rows} == {"signround"}
    assert all(row.relative_loss is None for row in rows)
    tune(tmp_path / "gptq", plan={"method": "gptq"}, signround=None)
    # It begins with GPTQ's codes, which few steps leave mostly as they are.
    ours, theirs = read_all(tuned), read_all(tmp_path / "gptq")
    name = "model.language_model.layers.0.linear_attn.in_proj_qkv.weight_packed"
    same = np.unpackbits((ours[name] ^ theirs[name]).view(np.uint8)).mean()
    assert 0 < same < 0.1


@pytest.mark.slow
def test_steps_that_only_spoil_a_layer_are_not_taken(tmp_path: Path) -> None:
    tune(tmp_path / "spoilt", signround=SignRound(steps=2, rate=0.5, range_rate=0.4, checks=2))
    tune(tmp_path / "gptq", plan={"method": "gptq"}, signround=None)
    ours, theirs = read_all(tmp_path / "spoilt"), read_all(tmp_path / "gptq")
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    rows = read_log(tmp_path / "spoilt" / LOG_NAME)
    assert {row.method for row in rows} == {"gptq"}
    assert all("found nothing better" in row.note and row.relative_loss is not None for row in rows)


def test_workers_memory_and_torchs_threads_change_no_byte(tuned: Path, tmp_path: Path) -> None:
    tune(tmp_path / "one", workers=1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        # Two batches a step, of which there is memory for one at a time.
        tune(tmp_path / "three", workers=3, max_ram_bytes=50_000_000)
    finally:
        torch.set_num_threads(before)
    assert comparable(tmp_path / "one") == comparable(tuned)
    assert comparable(tmp_path / "three") == comparable(tuned)


@pytest.mark.slow
def test_several_batches_a_step_are_summed_in_their_order(tmp_path: Path) -> None:
    wide = SignRound(steps=3, batch=64)
    tune(tmp_path / "one", workers=1, signround=wide, samples=96)
    tune(tmp_path / "three", workers=3, signround=wide, samples=96)
    assert comparable(tmp_path / "one") == comparable(tmp_path / "three")


_KILLED = """
import sys
from pathlib import Path
from tests.calibrate.test_signround import tune
tune(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_tunes_resumes_at_its_layer_and_gives_the_same_bytes(tuned: Path, tmp_path: Path) -> None:
    target = tmp_path / "killed"
    command = [sys.executable, "-c", _KILLED, str(target)]
    environment = {**os.environ, "PYTHONPATH": str(FIXTURE.parents[1])}
    state = target / ".surgeon" / "calibration.json"
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    # The last layer's targets are there only while it is tuned.
    while process.poll() is None and time.monotonic() < deadline:
        if (target / ".surgeon" / "targets.bin").exists():
            time.sleep(0.3)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait()
    assert state.exists(), "the run ended before it could be killed"
    assert json.loads(state.read_bytes())["layer"] == 3
    tune(target, resume=True)
    assert comparable(target) == comparable(tuned)


FORMATS: list[dict[str, Any]] = [
    {"layout": "ct-packed", "num_bits": 4, "group_size": 128},
    {"layout": "ct-packed", "num_bits": 4, "symmetric": False},
    {"layout": "ct-int", "num_bits": 8, "group_size": -1},
    {"layout": "gptq", "num_bits": 4},
    {"layout": "gptq-v2", "num_bits": 4, "symmetric": False},
    {"layout": "awq", "num_bits": 4},
    {"layout": "autoround", "num_bits": 2},
    {"layout": "autoround-awq", "num_bits": 4, "symmetric": False},
    {"layout": "quark-int8", "num_bits": 8, "group_size": -1},
    {"layout": "quark-int4", "num_bits": 4},
]


@pytest.mark.slow
@pytest.mark.parametrize("plan", FORMATS, ids=lambda plan: "-".join(map(str, plan.values())))
def test_every_integer_grid_is_tuned_and_the_judge_reads_it_back(plan: dict[str, Any], tmp_path: Path) -> None:
    options = SignRound(steps=2, checks=2, rate=0.005, range_rate=0.0005)
    # Words of codes go along outputs in some layouts, and these have four.
    few = ["{path*}.in_proj_a.weight", "{path*}.in_proj_b.weight"]
    result = tune(tmp_path / "out", plan={**plan, "keep": few}, samples=16, signround=options)
    assert set(result.summary["methods"]) <= {"signround", "gptq"}
    assert result.summary["methods"].get("signround", 0) > 60
    judged = surgeon("verify", tmp_path / "out", "--against", FIXTURE)
    assert judged.exit_code == 0, judged.stdout


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral"])
def test_other_architectures_are_tuned(kind: str, tmp_path: Path) -> None:
    source, ids = save_random(tmp_path / "model", kind), write_ids(tmp_path / "ids.npy")
    tune(tmp_path / "out", source, ids, plan={"group_size": 16}, samples=6, signround=SignRound(steps=6))
    errors = errors_by_layer(tmp_path / "out")
    assert errors
    assert all(after < before for before, after in errors.values())


@pytest.mark.slow
def test_without_sequential_targets_are_what_the_layer_makes_of_the_same_states(tmp_path: Path) -> None:
    tune(tmp_path / "out", sequential=False)
    assert all(after < before for before, after in errors_by_layer(tmp_path / "out").values())
    assert not (tmp_path / "out" / ".surgeon").exists()


@pytest.mark.slow
def test_autorounds_recipe_begins_with_rounding(tmp_path: Path) -> None:
    recipe = recipe_named("autoround:10")
    assert recipe == replace(RECIPES["autoround"], steps=10)
    tune(tmp_path / "out", signround=recipe)
    tune(tmp_path / "rounded", plan={"method": "gptq"}, signround=None, fallback_tokens=10**9)
    rows: list[LogRow] = read_log(tmp_path / "out" / LOG_NAME)
    assert {row.method for row in rows} == {"signround"}
    ours, theirs = read_all(tmp_path / "out"), read_all(tmp_path / "rounded")
    name = "model.language_model.layers.0.mlp.experts.0.down_proj.weight_packed"
    assert np.unpackbits((ours[name] ^ theirs[name]).view(np.uint8)).mean() < 0.25
    assert record(tmp_path / "out")["options"]["signround"]["start"] == "rtn"
    assert record(tmp_path / "out")["leaning_targets"] == 0


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.Parameter(torch.randn(4, 6, 8))
        self.plain = nn.Parameter(torch.randn(8, 6))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(len(hidden), 6)
        for expert in torch.tensor([0, 2, 2]):
            made = made + nn.functional.linear(hidden, self.stack[expert])
        return nn.functional.linear(made, self.plain)


def test_slopes_of_experts_are_those_of_the_stack_and_unused_ones_have_none() -> None:
    module, hidden, target = _Experts(), torch.randn(5, 8), torch.randn(5, 8)
    parameters = {"stack": module.stack, "plain": module.plain}
    found = slopes_of(lambda: module(hidden), target, parameters)
    loss = (module(hidden) - target).square().sum()
    stack, plain = torch.autograd.grad(loss, [module.stack, module.plain])
    assert set(found) == {("plain", None), ("stack", 0), ("stack", 2)}
    assert torch.allclose(found["plain", None], plain)
    assert all(torch.allclose(found["stack", expert], stack[expert]) for expert in (0, 2))


def test_memory_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"what SignRound needs beside them.*give at least \d+MB"):
        tune(tmp_path / "out", max_ram_bytes=8_000_000)
    assert not (tmp_path / "out").exists()


def test_it_needs_text_and_a_step_that_wants_it(tmp_path: Path) -> None:
    plan = plan_of(FIXTURE, method="signround")
    with pytest.raises(RecipeError, match="runs the layers on text"):
        run_calibrated(plan, tmp_path / "out", CalibrationOptions(read_statistics=tmp_path))
    with pytest.raises(RecipeError, match="no step has method signround"):
        tune(tmp_path / "out", plan={"method": "gptq"})
    with pytest.raises(RecipeError, match="a step chooses codes by calibration"):
        run_plan(plan, tmp_path / "out")


def test_on_the_command_line_it_is_a_method_and_a_recipe(tmp_path: Path) -> None:
    said = refused(tmp_path / "a", "--calibration", TEXT, "--signround", "autorond", "--set", "method=signround", *FEW)
    assert "did you mean 'autoround'" in said
    result = surgeon(
        "apply", "quantize-linears", FIXTURE, tmp_path / "out", "--set", "format=ct-packed", "--set", "num_bits=4",
        "--set", "group_size=128", "--set", "method=signround", "--signround", "default:2", "--calibration", TEXT, *FEW, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["methods"] == {"signround": 127}
    assert "SignRound, layer's mean squared error" in result.stderr
    card = surgeon("card", tmp_path / "out", "--against", FIXTURE)
    assert "chosen by SignRound on calibration data" in (tmp_path / "out" / "README.md").read_text() + card.stdout


def test_narrow_floats_are_refused_when_planning() -> None:
    """Before a text is read or a model is built."""
    run = surgeon("plan", "nvfp4a16", FIXTURE, "--set", "method=signround")
    assert run.exit_code == 10
    assert "method signround tunes integer codes, and ct-nvfp4 writes nvfp4 codes" in run.stderr

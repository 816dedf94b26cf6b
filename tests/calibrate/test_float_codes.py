"""Calibrated FP8 and FP4: codes are GPTQ's, the same for any number of workers, and what a reader computes with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensorsurgeon.calibrate.log import LOG_NAME, read_log
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.run import run_calibrated
from tensorsurgeon.errors import PlanError
from tensorsurgeon.running.run import run_plan
from tensorsurgeon.verifying.judging import verify
from tests.calibrate.models import comparable, options_of, plan_of
from tests.checkpoints import FIXTURE, read_all

LAYOUTS: dict[str, dict[str, Any]] = {
    "ct-float": {},
    "hf-fp8": {},
    "ct-nvfp4": {},
    "ct-mxfp4": {},
    "quark-fp8": {},
}


def plan_in(layout: str, **fields: Any) -> Any:
    return plan_of(FIXTURE, layout=layout, num_bits=None, group_size=None, **LAYOUTS[layout], **fields)


QUICK = ("ct-float", "ct-nvfp4")


@pytest.mark.parametrize("layout", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in LAYOUTS])
def test_every_codes_are_chosen_and_workers_change_no_byte(tmp_path: Path, layout: str) -> None:
    options = options_of(gptq=CalibrationOptions.default_gptq())
    for workers in (1, 3):
        run_calibrated(plan_in(layout), tmp_path / str(workers), options, workers=workers)
    assert comparable(tmp_path / "1") == comparable(tmp_path / "3")
    rows = read_log(tmp_path / "1" / LOG_NAME)
    assert {row.method for row in rows} == {"gptq"}
    assert all(row.relative_loss is not None and row.relative_loss < 0.02 for row in rows)
    run_plan(plan_in(layout, method="rtn"), tmp_path / "rtn")
    rounded, made = read_all(tmp_path / "rtn"), read_all(tmp_path / "1")
    assert {name: (a.dtype, a.shape) for name, a in rounded.items()} == {name: (a.dtype, a.shape) for name, a in made.items()}
    codes = [name for name, array in made.items() if array.ndim == 2 and array.itemsize == 1 and "scale" not in name]
    assert sum(made[name].tobytes() != rounded[name].tobytes() for name in codes) >= len(rows)
    assert verify(tmp_path / "1", against=FIXTURE).is_sound


def test_what_engines_fuse_keeps_one_global_scale(tmp_path: Path) -> None:
    run_calibrated(plan_in("ct-nvfp4"), tmp_path / "out", options_of(), workers=2)
    made = read_all(tmp_path / "out")
    gates = [name for name in made if name.endswith("experts.3.gate_proj.weight_global_scale")]
    assert len(gates) == 4
    for name in gates:
        assert made[name].tobytes() == made[name.replace("gate_proj", "up_proj")].tobytes()


def test_a_gpu_is_not_asked_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorsurgeon.calibrate import run

    monkeypatch.setattr(run, "works_on_card", lambda device: True)
    with pytest.raises(PlanError, match="mxfp4 codes are chosen on the CPU only"):
        run_calibrated(plan_in("ct-mxfp4"), tmp_path / "out", options_of())
    assert not (tmp_path / "out").exists()

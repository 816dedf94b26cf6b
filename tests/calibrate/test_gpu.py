"""Calibration with the forwards on a GPU: not the same bits as on a CPU, but the same work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tensorsurgeon.calibrate.log import LOG_NAME, read_log
from tensorsurgeon.calibrate.run import run_calibrated
from tensorsurgeon.errors import RecipeError
from tests.calibrate.models import options_of, plan_of
from tests.checkpoints import FIXTURE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_losses_on_a_gpu_are_those_on_a_cpu_within_rounding(tmp_path: Path) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        result = run_calibrated(plan_of(FIXTURE), tmp_path / device, options_of(samples=24, sequence_length=128), device=device)
        assert result.summary["methods"] == {"gptq": 127}
        losses[device] = {row.module: row.relative_loss or 0.0 for row in read_log(tmp_path / device / LOG_NAME)}
    assert losses["cpu"].keys() == losses["cuda"].keys()
    means = {device: sum(found.values()) / len(found) for device, found in losses.items()}
    assert means["cuda"] == pytest.approx(means["cpu"], rel=5e-3)
    for module, loss in losses["cpu"].items():
        assert losses["cuda"][module] == pytest.approx(loss, rel=0.25), module


@pytest.mark.parametrize("name", ["cuda:7", "cuda:99999", "gpu", "CUDA", "meta", "mps", ""])
def test_a_device_that_is_not_there_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"device {name}: "):
        run_calibrated(plan_of(FIXTURE), tmp_path / "out", options_of(), device=name)
    assert not (tmp_path / "out").exists()

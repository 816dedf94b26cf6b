"""Every kind of decoder and of stacked experts is calibrated as a card does it, run in plain torch where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tensorsurgeon.calibrate import driver, run
from tensorsurgeon.calibrate.card import experts
from tensorsurgeon.calibrate.log import LOG_NAME, LogRow, read_log
from tensorsurgeon.calibrate.run import run_calibrated
from tests.calibrate.models import options_of, write_ids
from tests.calibrate.test_quantized_sources import gptq_plan
from tests.families import build

CARD = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {
    "llama": "a class whose experts' implementation cannot be set, for it has none",
    "gpt_oss": "experts in grouped products, transposed and with biases",
    "llama4_text": "every token goes to every expert",
    "dbrx": "experts below each other",
    "gemma3n_text": "states of four dimensions, and what layers hand on",
    "mamba2": "states in F32",
    "qwen3_moe_fp8": "an FP8 source",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_losses_are_those_of_the_cpu_within_rounding(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Few tokens are cut all the same.
    monkeypatch.setattr(driver, "BATCH_TOKENS", 512)
    monkeypatch.setattr(experts, "WINDOW_TOKENS", 200)
    build.write(name, tmp_path)
    options = options_of(write_ids(tmp_path / "ids.npy", rows=12, vocabulary=400), samples=12)
    rows: dict[str, dict[str, LogRow]] = {}
    for way in ("card", "cpu"):
        monkeypatch.setattr(run, "works_on_card", lambda device, way=way: way == "card")
        device = CARD if way == "card" else "cpu"
        run_calibrated(gptq_plan(tmp_path / "source"), tmp_path / way, options, workers=2, device=device)
        rows[way] = {row.module: row for row in read_log(tmp_path / way / LOG_NAME)}
    assert rows["card"].keys() == rows["cpu"].keys()
    for module, row in rows["cpu"].items():
        other = rows["card"][module]
        assert other.method == row.method == "gptq", module
        # A token that an expert chosen by a hair loses or wins.
        assert other.tokens == pytest.approx(row.tokens, rel=0.05)
        assert other.relative_loss == pytest.approx(row.relative_loss, rel=0.1)

"""Runs whose targets lean towards the original layers' outputs: both streams carried, the same bytes, nothing unsaid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tensorsurgeon.calibrate.log import LOG_NAME, read_log
from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.run import run_calibrated
from tensorsurgeon.calibrate.state import CalibrationState, Reached
from tensorsurgeon.errors import RecipeError
from tests.calibrate.commands import record
from tests.calibrate.models import comparable, options_of, plan_of
from tests.checkpoints import FIXTURE, read_all


def run(target: Path, *, workers: int = 2, resume: bool = False, plan: dict[str, Any] | None = None, **fields: Any) -> None:
    given = {"samples": 12, "sequence_length": 64, **fields}
    options = CalibrationOptions(**given) if "read_statistics" in given else options_of(**given)
    run_calibrated(plan_of(FIXTURE, **(plan or {"num_bits": 3})), target, options, workers=workers, resume=resume)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder / "out", write_statistics=folder / "kept")
    return folder


def test_it_is_on_at_few_bits_with_signed_scales_and_the_record_says_so(whole: Path, tmp_path: Path) -> None:
    assert record(whole / "out")["leaning_targets"] == record(whole / "out")["signed_scales"] == 127
    run(tmp_path / "eight", samples=2, plan={"num_bits": 8})
    assert (record(tmp_path / "eight")["leaning_targets"], record(tmp_path / "eight")["signed_scales"]) == (0, 127)
    run(tmp_path / "unsigned", samples=2, plan={"num_bits": 3, "signed": False})
    assert (record(tmp_path / "unsigned")["leaning_targets"], record(tmp_path / "unsigned")["signed_scales"]) == (0, 0)


def test_only_layers_behind_quantized_ones_lean(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "plain", asymmetric=0.0)
    leaning, plain = read_all(whole / "out"), read_all(tmp_path / "plain")
    codes = [name for name in leaning if name.endswith("weight_packed")]
    differ = {name for name in codes if leaning[name].tobytes() != plain[name].tobytes()}
    assert not [name for name in differ if ".layers.0." in name]
    assert [name for name in codes if ".layers.0." not in name and name not in differ] == []


def test_workers_change_no_byte(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "one", workers=1, write_statistics=tmp_path / "kept")
    assert comparable(tmp_path / "one") == comparable(whole / "out")
    for path in sorted((whole / "kept").iterdir()):
        one, two = load_file(path), load_file(tmp_path / "kept" / path.name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("damaged", ["", "hidden", "original"])
def test_a_stopped_run_goes_on_with_both_streams(
    damaged: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    advance = CalibrationState.advance

    def stopping(self: CalibrationState, reached: Reached, *rest: Any) -> Reached:
        made = advance(self, reached, *rest)
        if made.layer == 2:
            raise Stopped
        return made

    kept = {"write_statistics": tmp_path / "kept"}
    with monkeypatch.context() as patch:
        patch.setattr(CalibrationState, "advance", stopping)
        with pytest.raises(Stopped):
            run(tmp_path / "out", **kept)
    left = sorted(path.name for path in (tmp_path / "out" / ".surgeon").glob("*.bin"))
    assert left == ["hidden-00002.bin", "original-00002.bin"]
    if damaged:
        path = tmp_path / "out" / ".surgeon" / f"{damaged}-00002.bin"
        raw = bytearray(path.read_bytes())
        raw[4097] ^= 16
        path.write_bytes(raw)
    run(tmp_path / "out", resume=True, **kept)
    assert comparable(tmp_path / "out") == comparable(whole / "out")


def test_kept_statistics_give_the_same_codes_or_are_refused(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "again", read_statistics=whole / "kept", gptq=options_of().gptq)
    found, wanted = read_all(tmp_path / "again"), read_all(whole / "out")
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
    # The first layer's inputs are the original ones.
    assert not [name for name in load_file(whole / "kept" / "layer-00000.safetensors") if name.endswith(".cross")]
    second = load_file(whole / "kept" / "layer-00001.safetensors")
    crosses = [name for name in second if name.endswith(".cross")]
    assert len(crosses) == len(second) // 2
    assert all(bool(second[name].abs().max() > 0) and bool(torch.isfinite(second[name]).all()) for name in crosses)
    run(tmp_path / "eight", samples=2, plan={"num_bits": 8}, write_statistics=tmp_path / "uncrossed")
    with pytest.raises(RecipeError, match="asymmetric"):
        run(tmp_path / "refused", read_statistics=tmp_path / "uncrossed", asymmetric=0.5)
    run(tmp_path / "off", read_statistics=tmp_path / "uncrossed", asymmetric=0.0)
    run(tmp_path / "auto", read_statistics=tmp_path / "uncrossed")
    off, auto = read_all(tmp_path / "off"), read_all(tmp_path / "auto")
    assert all(off[name].tobytes() == auto[name].tobytes() for name in off)


@pytest.mark.slow
def test_outputs_come_nearer_to_the_original_ones(tmp_path: Path) -> None:
    """The last layer's states of held-out tokens under leaning codes and under plain ones, against the original ones."""
    from tests.calibrate.commands import weights_of

    run(tmp_path / "leaning", samples=60, sequence_length=128)
    run(tmp_path / "plain", samples=60, sequence_length=128, asymmetric=0.0)
    rows = read_log(tmp_path / "leaning" / LOG_NAME)
    assert {row.method for row in rows} == {"gptq"}
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    text = (FIXTURE.parent / "text" / "heldout.txt").read_text()
    ids = torch.tensor(AutoTokenizer.from_pretrained(FIXTURE)(text)["input_ids"][:4000]).view(-1, 250)

    def logits(folder: Path) -> torch.Tensor:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="eager").eval()
        with torch.inference_mode():
            found: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        return found

    original = logits(FIXTURE)
    divergence = {}
    for name in ("leaning", "plain"):
        weights_of(tmp_path / name, tmp_path / f"{name}-back")
        divergence[name] = float((original.exp() * (original - logits(tmp_path / f"{name}-back"))).sum(-1).mean())
    assert divergence["leaning"] < divergence["plain"]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(RecipeError, match="0 to 1"):
        options_of(asymmetric=1.5)
    with pytest.raises(RecipeError, match="original outputs"):
        options_of(asymmetric=0.5, sequential=False)

"""The walk of an evaluation: several targets, stopped and started again, texts of every shape, and what it refuses."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tensorsurgeon.calibrate.walk import head
from tensorsurgeon.errors import Interrupted, RecipeError
from tensorsurgeon.evaluating import predicting
from tensorsurgeon.evaluating.options import TextOptions
from tensorsurgeon.evaluating.run import evaluate
from tensorsurgeon.evaluating.step import Step
from tests.calibrate.models import save_random
from tests.checkpoints import FIXTURE
from tests.evaluating.judging import HELDOUT, convert, load, log_probabilities


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("models") / "source", "qwen3_moe")


@pytest.fixture
def target(source: Path, tmp_path: Path) -> Path:
    return convert("quantize-linears", source, tmp_path / "target", format="ct-int")


def write_ids(path: Path, lengths: list[int]) -> TextOptions:
    rng = np.random.default_rng(3)
    path.write_text(json.dumps([rng.integers(0, 96, n).tolist() for n in lengths]))
    return TextOptions(locations=(str(path),))


@pytest.mark.parametrize("kind", ["llama", "tied", "gemma3", "mixtral"])
def test_perplexity_alone_equals_transformers(kind: str, tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", kind)
    text = write_ids(tmp_path / "ids.json", [48] * 5)
    tokens = np.array(json.loads((tmp_path / "ids.json").read_text()))
    found = evaluate([folder], text, workers=2)
    predicted = log_probabilities(load(folder), tokens)[:, :-1]
    assert found.source is None
    assert "kl" not in found.targets[0]
    wanted = float(-predicted.gather(-1, torch.from_numpy(tokens)[:, 1:, None]).mean())
    assert found.targets[0]["nll"] == pytest.approx(wanted, rel=1e-9)


def test_soft_capped_logits_are_capped(tmp_path: Path) -> None:
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=2, final_logit_softcapping=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    text = write_ids(tmp_path / "ids.json", [32] * 3)
    tokens = np.array(json.loads((tmp_path / "ids.json").read_text()))
    predicted = log_probabilities(load(tmp_path / "model"), tokens)[:, :-1]
    wanted = float(-predicted.gather(-1, torch.from_numpy(tokens)[:, 1:, None]).mean())
    assert evaluate([tmp_path / "model"], text).targets[0]["nll"] == pytest.approx(wanted, rel=1e-9)


def test_pieces_of_the_vocabulary_change_nothing(source: Path, target: Path, tmp_path: Path, monkeypatch: Any) -> None:
    text = write_ids(tmp_path / "ids.json", [30] * 4)
    whole = evaluate([target], text, against=source)
    monkeypatch.setattr(predicting, "PIECE_ROWS", 7)
    cut = evaluate([target], text, against=source)
    assert head.PIECE_ROWS > 96
    for key in ("kl", "kl_se", "reverse_kl", "nll", "top1_agreement"):
        assert cut.targets[0][key] == pytest.approx(whole.targets[0][key], rel=1e-5), key


def test_lists_of_other_lengths_are_sequences_of_their_own(source: Path, target: Path, tmp_path: Path) -> None:
    lengths = [40, 3, 17, 40, 29]
    together = evaluate([target], write_ids(tmp_path / "ids.json", lengths), against=source).targets[0]
    lists = json.loads((tmp_path / "ids.json").read_text())
    kl, nll = 0.0, 0.0
    for number, ids in enumerate(lists):
        (tmp_path / f"{number}.json").write_text(json.dumps([ids]))
        alone = evaluate([target], TextOptions(locations=(str(tmp_path / f"{number}.json"),)), against=source).targets[0]
        assert alone["kl_se"] is None
        kl += alone["kl"] * len(ids)
        nll += alone["nll"] * (len(ids) - 1)
    # Products of other shapes round otherwise, by less than the last digit that is shown.
    assert together["kl"] == pytest.approx(kl / sum(lengths), rel=0.02)
    assert together["nll"] == pytest.approx(nll / (sum(lengths) - len(lengths)), rel=1e-3)


def test_a_model_is_no_distance_from_itself(source: Path, tmp_path: Path) -> None:
    found = evaluate([source], write_ids(tmp_path / "ids.json", [30] * 3), against=source).targets[0]
    assert abs(found["kl"]) < 1e-9
    assert found["top1_agreement"] == 1
    assert set(found["hidden_error"]) == {0.0}


@pytest.mark.parametrize("stopped_at", [1, 3, 5])
def test_stopped_and_started_again_it_goes_on(
    stopped_at: int, source: Path, target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = write_ids(tmp_path / "ids.json", [64] * 70)
    whole = evaluate([target], text, against=source)
    assert not (target / ".cache").exists()
    stop = threading.Event()
    told = 0

    def progress(step: Step) -> None:
        nonlocal told
        told += 1
        if told == stopped_at:
            stop.set()

    with pytest.raises(Interrupted):
        evaluate([target], text, against=source, stop=stop, progress=progress)
    assert (target / ".cache" / "surgeon-evaluation" / "reached.json").exists()
    steps: list[Step] = []
    with caplog.at_level(logging.INFO, "tensorsurgeon.evaluating"):
        again = evaluate([target], text, against=source, progress=steps.append)
    assert ("going on at layer" in caplog.text) is (stopped_at > 0)
    assert steps[0].done == {1: 0, 3: 2, 5: 0}[stopped_at]
    assert again == whole
    assert not (target / ".cache").exists()


def test_states_that_were_changed_begin_again(source: Path, target: Path, tmp_path: Path) -> None:
    text = write_ids(tmp_path / "ids.json", [64] * 70)
    whole = evaluate([target], text, against=source)
    stop = threading.Event()
    with pytest.raises(Interrupted):
        evaluate([target], text, against=source, stop=stop, progress=lambda step: stop.set() if step.done == 2 else None)
    kept = sorted((target / ".cache" / "surgeon-evaluation").glob("states-00001-*.bin"))
    assert len(kept) == 2
    data = bytearray(kept[1].read_bytes())
    data[100] ^= 1
    kept[1].write_bytes(data)
    assert evaluate([target], text, against=source) == whole


def test_texts_and_models_that_do_not_fit_are_refused(source: Path, target: Path, tmp_path: Path) -> None:
    text = write_ids(tmp_path / "ids.json", [30] * 3)
    with pytest.raises(RecipeError, match="they are not the same model"):
        evaluate([target], text, against=FIXTURE)
    with pytest.raises(RecipeError, match=r"ids\.json holds token ids and .*heldout\.txt text"):
        evaluate([target], TextOptions(locations=(str(HELDOUT), *text.locations)))
    (tmp_path / "large.json").write_text("[[1, 96]]")
    with pytest.raises(RecipeError, match="list 0 has token id 96, but the model's vocabulary has 96 rows"):
        evaluate([target], TextOptions(locations=(str(tmp_path / "large.json"),)))
    (tmp_path / "short.json").write_text("[[1, 2], [3]]")
    with pytest.raises(RecipeError, match="list 1 has 1 token ids; two are needed"):
        evaluate([target], TextOptions(locations=(str(tmp_path / "short.json"),)))

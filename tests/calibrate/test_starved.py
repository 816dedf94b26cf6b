"""Starved and broken input: a clear message or a fallback on record, and never a NaN in the output.

Four tokens, a repeated token, a NaN activation, an empty file, a text shorter than a chunk, a tokenizer that does not fit.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tensorsurgeon.calibrate.data.data import load_data
from tensorsurgeon.calibrate.log import LOG_NAME, read_log
from tensorsurgeon.calibrate.run import run_calibrated
from tensorsurgeon.calibrate.walk import statistics
from tensorsurgeon.errors import RecipeError
from tests.calibrate.commands import FEW, assert_finite, calibrate, record, refused, surgeon
from tests.calibrate.models import TEXT, options_of, plan_of, save_random, write_ids
from tests.checkpoints import FIXTURE, assert_same, read_all

PUBLISHED = ("gptq-int4-g128", "ct-w4a16-g32", "ct-w8a16")
# The vision tower is in the scope of one of them, and no text reaches it.
UNREACHED = {"ct-w8a16": {"lies outside the decoder layers that transformers runs"}}


def methods(target: Path) -> Counter[str]:
    return Counter(row.method for row in read_log(target / LOG_NAME))


def notes(target: Path) -> set[str]:
    """Why modules were rounded to nearest."""
    return {row.note for row in read_log(target / LOG_NAME) if row.method == "rtn"}


def assert_sound(target: Path, work: Path) -> None:
    """`surgeon verify` has no complaint, and nothing in the output is NaN or infinite."""
    result = surgeon("verify", target, "--against", FIXTURE)
    assert result.exit_code == 0, result.stdout
    assert_finite(target, work)


@pytest.fixture
def four(tmp_path: Path) -> Path:
    return write_ids(tmp_path / "four.npy", rows=1, length=4)


@pytest.mark.parametrize("transform", PUBLISHED)
def test_four_tokens_round_everything_to_nearest_and_say_so(transform: str, four: Path, tmp_path: Path) -> None:
    asked = ("--calibration", four, "--samples", 1, "--sequence-length", 4)
    said = calibrate(tmp_path / "out", *asked, transform=transform)
    assert " rtn (100.0 %)" in said
    assert "saw fewer than 8 calibration tokens" in said
    assert notes(tmp_path / "out") == {"saw fewer than 8 calibration tokens"} | UNREACHED.get(transform, set())
    assert surgeon("apply", transform, FIXTURE, tmp_path / "rounded", "--set", "signed=true").exit_code == 0
    assert_same(read_all(tmp_path / "out"), read_all(tmp_path / "rounded"))
    assert_sound(tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize("transform", PUBLISHED)
def test_four_tokens_without_a_fallback_still_give_finite_codes(transform: str, four: Path, tmp_path: Path) -> None:
    asked = ("--calibration", four, "--samples", 1, "--sequence-length", 4, "--fallback-tokens", 0, "--experts", "routed")
    said = calibrate(tmp_path / "out", *asked, transform=transform)
    assert notes(tmp_path / "out") == {"saw no calibration token"} | UNREACHED.get(transform, set())
    assert "saw no calibration token" in said
    assert methods(tmp_path / "out")["gptq"] > 0
    assert_sound(tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize("transform", PUBLISHED)
def test_one_token_repeated_gives_finite_codes(transform: str, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.full((8, 64), 17))
    calibrate(tmp_path / "out", "--calibration", tmp_path / "ids.npy", *FEW, transform=transform)
    assert methods(tmp_path / "out")["gptq"] > 0
    assert_sound(tmp_path / "out", tmp_path / "back")


def test_a_word_repeated_in_a_text_gives_finite_codes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the " * 2000)
    calibrate(tmp_path / "out", "--calibration", tmp_path / "text.txt", *FEW)
    assert record(tmp_path / "out")["tokens"] == [4, 64]
    assert_sound(tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("model.layers.1.input_layernorm.weight", 3, "layers.1: hidden states of calibration sample 0 are not finite"),
        # Only what the last sample says.
        ("model.embed_tokens.weight", 91, "the embeddings: hidden states of calibration sample 2 are not finite"),
    ],
)
def test_a_nan_in_an_activation_names_layer_and_sample_and_publishes_nothing(
    name: str, row: int, message: str, value: float, tmp_path: Path
) -> None:
    folder = save_random(tmp_path / "model", "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = np.random.default_rng(0).integers(0, 90, (3, 64))
    # Samples are drawn in an order of their own: each row has a token by which it is known.
    ids[:, 5] = 92, 93, 94
    np.save(tmp_path / "ids.npy", ids)
    asked = options_of(tmp_path / "ids.npy", samples=3, sequence_length=64)
    order = load_data(asked, folder, 96).tokens[:, 5]
    ids[ids[:, 5] == order[2], 7] = 91
    np.save(tmp_path / "ids.npy", ids)
    given = ("--set", "group_size=16", "--calibration", tmp_path / "ids.npy", "--samples", 3, "--sequence-length", 64)
    assert message in refused(tmp_path / "out", *given, code=42, source=folder)


def test_inputs_that_overflow_fall_back_and_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = statistics.HessianAccumulator.result

    def overflowing(self: Any) -> torch.Tensor:
        total = original(self)
        return total * float("inf") if self.in_features == 16 else total

    monkeypatch.setattr(statistics.HessianAccumulator, "result", overflowing)
    folder = save_random(tmp_path / "model", "qwen3_moe")
    options = options_of(write_ids(tmp_path / "ids.npy"))
    result = run_calibrated(plan_of(folder, group_size=16), tmp_path / "out", options, workers=2)
    assert result.summary["rtn_reasons"] == {"saw inputs that are not finite": 8}
    assert_finite(tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "empty.txt: is empty; calibration needs text"),
        ("empty.jsonl", "", "empty.jsonl: is empty; calibration needs text"),
        ("blank.jsonl", "\n\n", "holds no document; calibration needs text"),
        ("blank.txt", " \n" * 9, "tokens, fewer than one chunk of 64; give more text, or a smaller --sequence-length"),
        ("short.txt", "x = 1\n", "tokens, fewer than one chunk of 64; give more text, or a smaller --sequence-length"),
        ("short.jsonl", '{"text": "x = 1"}\n' * 3, "tokens, fewer than one chunk of 64; give more text, or a smaller"),
        ("short.json", "[[1, 2, 3]]", "short.json: has 3 tokens, fewer than one chunk of 64"),
    ],
)
def test_an_empty_file_and_a_text_shorter_than_a_chunk_are_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert message in refused(tmp_path / "out", "--calibration", tmp_path / name, *FEW)


def test_one_source_that_starves_among_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x = 1\n")
    said = refused(tmp_path / "out", "--calibration", TEXT, "--calibration", tmp_path / "short.txt", *FEW)
    assert "short.txt: has" in said


@pytest.fixture
def fixture_copy(tmp_path: Path) -> Path:
    """The trained fixture in a folder whose tokenizer may be changed."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "model"))


def larger(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [{"id": 2048 + n, "content": f"<x{n}>", "special": True, **flags} for n in range(5)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def of_another_kind(folder: Path) -> None:
    words(folder)
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def words(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "of": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}')


def absent(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()


def damaged(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": []}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (larger, "the tokenizer has 2051 tokens, but the model's vocabulary 2048 rows; it belongs to another model"),
        (of_another_kind, "makes no token of a text of"),
        (absent, "makes no token of a text of"),
        (damaged, "has no tokenizer that can be loaded (Model missing"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(
    change: Any, message: str, fixture_copy: Path, tmp_path: Path
) -> None:
    change(fixture_copy)
    assert message in refused(tmp_path / "out", "--calibration", TEXT, *FEW, source=fixture_copy)


def test_a_tokenizer_that_knows_too_few_words_is_refused(tmp_path: Path) -> None:
    words(tmp_path)
    with pytest.raises(RecipeError, match=r"does not know \d+ of \d+ tokens; is it this model's"):
        load_data(options_of(TEXT), tmp_path, 2048)


def test_token_ids_of_another_model_are_refused(tmp_path: Path) -> None:
    ids = write_ids(tmp_path / "ids.npy", vocabulary=150_000)
    assert "but the model's vocabulary has 2048 rows" in refused(tmp_path / "out", "--calibration", ids, *FEW)

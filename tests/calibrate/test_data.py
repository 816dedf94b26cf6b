"""Calibration data: sources, packing, sampling, and messages for what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tensorsurgeon.calibrate.data.data import CalibrationData, load_data, shares
from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource
from tensorsurgeon.errors import RecipeError
from tests.calibrate.models import TEXT, options_of
from tests.checkpoints import FIXTURE

_ROWS = 2048


def load(*locations: str | Path, **fields: object) -> CalibrationData:
    return load_data(options_of(*locations, **fields), FIXTURE, _ROWS)


def tokenizer() -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FIXTURE)


def test_text_is_packed_into_chunks_that_occur_in_it_in_order() -> None:
    data = load(samples=5, sequence_length=32)
    assert data.tokens.shape == (5, 32)
    whole = tokenizer()(TEXT.read_text(), add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    chunks = {tuple(whole[start : start + 32]) for start in range(0, len(whole) - 31, 32)}
    assert all(tuple(row) in chunks for row in data.tokens.tolist())
    assert len({tuple(row) for row in data.tokens.tolist()}) == 5


def test_the_seed_decides_the_sample_and_nothing_else_does() -> None:
    assert np.array_equal(load(seed=1).tokens, load(seed=1).tokens)
    assert not np.array_equal(load(seed=1).tokens, load(seed=2).tokens)


def test_json_lines_take_text_chats_and_ids(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello " * 30}, {"role": "assistant", "content": "def f(): pass\n" * 30}]
    for record in ({"text": "import os\n" * 100}, {"messages": chat}, {"input_ids": list(range(100))}):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(json.dumps(record) for _ in range(3)) + "\n\n")
        assert load(path, samples=2, sequence_length=16).tokens.shape == (2, 16)
    path.write_text(json.dumps({"messages": chat}))
    start = tokenizer().convert_tokens_to_ids("<|im_start|>")  # type: ignore[attr-defined]
    assert start in load(path, samples=8, sequence_length=32).tokens


def test_documents_are_separated_by_the_end_of_text_token(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": "x = 1"}) for _ in range(40)))
    end = tokenizer().eos_token_id  # type: ignore[attr-defined]
    tokens = load(path, samples=1, sequence_length=32).tokens[0]
    assert (tokens == end).sum() >= 5


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".json"])
def test_token_ids_need_no_tokenizer(suffix: str, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 50, (4, 24))
    path = tmp_path / f"ids{suffix}"
    if suffix == ".npy":
        np.save(path, ids)
    elif suffix == ".json":
        path.write_text(json.dumps(ids.tolist()))
    else:
        save_file({"input_ids": ids}, path)
    found = load_data(options_of(path, samples=4, sequence_length=24), tmp_path, 50).tokens
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, ids.tolist()))


def test_sources_are_drawn_by_weight_and_recorded(tmp_path: Path) -> None:
    np.save(tmp_path / "low.npy", np.full((40, 8), 3))
    np.save(tmp_path / "high.npy", np.full((40, 8), 1000))
    sources = (DataSource(str(tmp_path / "low.npy"), 3.0), DataSource(str(tmp_path / "high.npy"), 1.0))
    data = load_data(CalibrationOptions(sources=sources, samples=12, sequence_length=8), FIXTURE, _ROWS)
    assert (data.tokens == 3).all(1).sum() == 9
    assert [s["samples"] for s in data.sources] == [9, 3]
    assert len({s["digest"] for s in data.sources}) == 2
    assert data.tokens[:9].tolist() != sorted(data.tokens[:9].tolist())[:9] or (data.tokens[:9] == 1000).any()


def test_shares_add_up() -> None:
    assert shares([0.75, 0.25], 256) == [192, 64]
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert sum(shares([0.1, 0.7, 0.33], 17)) == 17


def test_a_weight_follows_the_last_colon() -> None:
    assert DataSource.parse("a.txt:0.75") == DataSource("a.txt", 0.75)
    assert DataSource.parse("a.txt") == DataSource("a.txt", 1.0)
    assert DataSource.parse("owner/name:train") == DataSource("owner/name:train", 1.0)
    with pytest.raises(RecipeError, match="must be positive"):
        DataSource.parse("a.txt:0")


def test_fewer_chunks_than_asked_for_are_said() -> None:
    data = load(samples=10_000, sequence_length=1024)
    assert 0 < len(data.tokens) < 10_000
    assert "10000 were asked for" in data.notes[0]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("short.txt", "x = 1\n", "fewer than one chunk of 64"),
        ("blank.jsonl", "\n\n", "holds no document"),
        ("broken.jsonl", '{"text": \n', "is not valid JSON"),
        ("other.jsonl", '{"body": "x"}\n', "has no text, messages or input_ids"),
        ("latin.txt", b"caf\xe9 " * 100, "is not UTF-8"),
        ("object.json", '{"text": "x"}', "must be a list"),
        ("floats.json", "[[0.5, 1.5]]", "must be whole numbers"),
        ("negative.json", "[[1, -2]]", "is negative"),
        ("large.json", "[[1, 2048]]", "token id 2048, but the model's vocabulary has 2048 rows"),
        ("not.npy", "text", "is not a NumPy array"),
        ("not.safetensors", "text", "is not a safetensors file"),
        ("chat.jsonl", '{"messages": [1]}\n', "must be objects with role"),
        ("image.jsonl", '{"messages": [{"role": "user", "content": {"a": 1}}]}\n', "refuses a chat"),
    ],
)
def test_data_that_cannot_be_used_says_why(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load(write(tmp_path / name, content))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load(tmp_path / "absent.txt")
    with pytest.raises(RecipeError, match="is a folder"):
        load(tmp_path)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="belongs to another model"):
        load_data(options_of(TEXT), FIXTURE, 1000)


def test_text_without_a_tokenizer_asks_for_ids(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no tokenizer"):
        load_data(options_of(TEXT), tmp_path, _ROWS)

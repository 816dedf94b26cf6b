"""Parquet as calibration data: every known column, several row groups, and messages for files that cannot be used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tensorsurgeon.calibrate.data.data import load_data
from tensorsurgeon.calibrate.data.documents import open_documents
from tests.calibrate.commands import FEW, assert_finite, calibrate, record, refused
from tests.calibrate.models import options_of
from tests.checkpoints import FIXTURE

CHAT = [{"role": "user", "content": "hello " * 30}, {"role": "assistant", "content": "def f(): pass\n" * 30}]
TEXTS = [f"import os{n}\n" * 60 for n in range(10)]


def write(path: Path, **columns: list[Any]) -> Path:
    """Row groups of four rows each, so that ten rows have three."""
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=4)
    return path


@pytest.mark.parametrize(
    "columns",
    [
        {"text": TEXTS},
        {"messages": [CHAT] * 10},
        {"input_ids": [list(range(n, n + 90)) for n in range(10)]},
        {"score": [0.5] * 10, "text": TEXTS, "url": [{"of": "elsewhere"}] * 10},
    ],
    ids="+".join,
)
def test_each_column_that_holds_documents_is_read_in_every_row_group(columns: dict[str, list[Any]], tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", **columns)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 3
    documents = open_documents(str(path))
    wanted = next(columns[name] for name in ("messages", "text", "input_ids") if name in columns)
    found = [documents.read(n) for n in range(documents.count)]
    assert [d.tolist() if isinstance(d, np.ndarray) else d for d in found] == wanted
    assert load_data(options_of(path, samples=4, sequence_length=32), FIXTURE, 2048).tokens.shape == (4, 32)


def test_a_run_on_parquet_records_its_digest_and_writes_finite_codes(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", text=TEXTS)
    calibrate(tmp_path / "out", "--calibration", path, *FEW, "--no-polish")
    source = record(tmp_path / "out")["sources"][0]
    assert source.pop("digest").startswith("xxh3_128:")
    assert source == {"name": "data.parquet", "kind": "parquet", "weight": 1.0, "samples": 4}
    assert_finite(tmp_path / "out", tmp_path / "back")


def test_parquet_gives_the_tokens_of_the_same_records_in_json_lines(tmp_path: Path) -> None:
    # In a table each message has every key, null where its record had none; a template must not see them.
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": "two"}}}
    chat = [*CHAT, {"role": "assistant", "content": None, "tool_calls": [call, other]}, {"role": "tool", "content": "3"}]
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(json.dumps({"messages": chat}) for _ in range(3)))
    path = write(tmp_path / "data.parquet", messages=[chat] * 3)
    assert "tool_calls" in pyarrow.parquet.read_table(path).to_pylist()[0]["messages"][0]
    asked = {"samples": 8, "sequence_length": 32}
    tokens = [load_data(options_of(file, **asked), FIXTURE, 2048).tokens for file in (lines, path)]
    assert np.array_equal(*tokens)


def test_a_row_whose_chat_is_null_gives_its_text(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", messages=[CHAT, None], text=["not read", "x = 1\n"])
    documents = open_documents(str(path))
    assert [documents.read(n) for n in range(2)] == [CHAT, "x = 1\n"]


def damaged(path: Path) -> Path:
    """The footer is whole; the pages that it points to are not."""
    content = bytearray(write(path, text=TEXTS).read_bytes())
    for at in range(4, 1000):
        content[at] ^= 0xFF
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("body", {"body": ["x"], "n": [1]}, "has no text, messages or input_ids (found: body, n)"),
        ("null", {"text": [None] * 3}, "holds no document: text is null"),
        ("numbers", {"text": [1, 2, 3]}, "holds no document: text is int"),
        ("none", {"text": pyarrow.array([], pyarrow.string())}, "holds no document; calibration needs text"),
        ("chat", {"messages": [[{"from": "human", "value": "x"}]]}, "must be objects with role and content"),
        ("bytes", {"text": pyarrow.Array.from_buffers(
            pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"caf\xe9")]
        )}, "row 0 is not UTF-8 text"),
        ("prose", b"not a table at all, but longer than a footer\n", "is not a Parquet file, or is damaged"),
        ("magic", b"PAR1", "is not a Parquet file, or is damaged"),
        ("empty", b"", "is empty"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_says_why(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, **content)
    assert f"{path}" in (said := refused(tmp_path / "out", "--calibration", path, *FEW))
    assert message in said


def test_a_file_cut_short_or_damaged_inside_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.parquet", text=TEXTS)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cut.parquet: is not a Parquet file, or is damaged" in refused(tmp_path / "out", "--calibration", path, *FEW)
    assert "cannot be read: " in (said := refused(tmp_path / "out", "--calibration", damaged(path), *FEW))
    assert not said.endswith("None")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data.parquet", text=TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    said = refused(tmp_path / "out", "--calibration", path, *FEW)
    assert "needs pyarrow: pip install 'tensorsurgeon[parquet]'" in said

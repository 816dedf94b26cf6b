"""``surgeon inspect``: what a checkpoint holds, from headers alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.cli import main
from tests.checkpoints import FIXTURE, INDEX
from tests.verifying.subjects import GOLDEN, MOE, RECIPES, Spoilt, subject


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, args)])


def data_of(path: Path) -> dict:
    result = run(path, "--json")
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_every_tensor_and_byte_is_counted_once() -> None:
    data = data_of(FIXTURE)
    checkpoint = open_checkpoint(FIXTURE)
    assert data["tensors"] == sum(g["count"] for g in data["groups"]) == len(checkpoint.specs)
    assert data["bytes"] == sum(g["bytes"] for g in data["groups"]) == checkpoint.weight_bytes
    assert data["tensors"] == sum(d["tensors"] for d in data["dtypes"].values())
    assert data["bytes"] == sum(d["bytes"] for d in data["dtypes"].values())
    assert data["tensors"] == sum(s["tensors"] for s in data["shards"])
    assert data["quantization"] is None
    assert data["oddities"] == []
    assert data["unfinished"] is False
    assert "tokenizer.json" in data["side_files"]


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "split"])
def test_quantization_is_recognised(name: str) -> None:
    data = data_of(subject(name))
    quantization = data["quantization"]
    assert quantization["modules"] == sum(quantization["schemes"].values()) == sum(quantization["quantized"].values())
    assert quantization["config"]
    assert not data["oddities"]
    assert data["made_by"]["recipe"]


def test_text_shows_patterns_and_schemes() -> None:
    result = run(GOLDEN / "quark_file-int8-qwen3-moe")
    assert result.exit_code == 0
    assert "Qwen3MoeForCausalLM" in result.stdout
    assert "quark int 8 bits, per channel, 16 modules" in result.stdout
    assert "model.layers.*.mlp.experts.*.up_proj.weight " in result.stdout
    assert "total_size 292488" in result.stdout


def test_a_stale_index_is_an_oddity(tmp_path: Path) -> None:
    for path in MOE.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    document = json.loads((tmp_path / INDEX).read_text())
    document["weight_map"]["model.norm.bias"] = "model-00001-of-00002.safetensors"
    document["weight_map"]["gone"] = "model-00003-of-00003.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(document))
    (tmp_path / "pytorch_model.bin").write_bytes(b"0")
    (tmp_path / ".surgeon").mkdir()
    data = data_of(tmp_path)
    assert any("model.norm.bias" in oddity for oddity in data["oddities"])
    assert any("model-00003-of-00003.safetensors, which is missing" in oddity for oddity in data["oddities"])
    assert data["left_behind"] == ["pytorch_model.bin"]
    assert data["unfinished"] is True
    text = run(tmp_path).stdout
    assert "unfinished run" in text
    assert "pytorch_model.bin holds weights that are no part" in text


def test_a_config_that_says_nothing_of_its_quantization_is_an_oddity(tmp_path: Path) -> None:
    spoilt = Spoilt(subject("quark-int8"), tmp_path / "spoilt")
    del spoilt.config["quantization_config"]
    data = data_of(spoilt.save())
    assert data["quantization"]["config"] is None
    assert any("stored quantized, but the config does not say so" in oddity for oddity in data["oddities"])


def test_nothing_but_headers_and_small_files_is_read(tmp_path: Path) -> None:
    """A shard whose data are a hole of 8 GiB is inspected as fast as any other."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [1 << 33], "data_offsets": [0, 1 << 33]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + (1 << 33))
    assert data_of(tmp_path)["bytes"] == 1 << 33
    assert path.stat().st_blocks * 512 < 1 << 20


def test_a_broken_header_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    result = run(tmp_path)
    assert result.exit_code == 21
    assert result.stderr.count("\n") == 1

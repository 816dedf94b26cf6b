"""Headers, index, record and leftovers: what a half-copied, half-written or edited folder looks like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.verifying import Fault, verify
from tests.checkpoints import INDEX, apply
from tests.verifying.subjects import FIXTURE, MOE, subject, write_shard

SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good run in several shards, with its record."""
    apply(load_transform("split-experts"), FIXTURE, tmp_path / "out", workers=1, max_shard_bytes=4_000_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    assert verify(tmp_path / "out").is_sound
    return tmp_path / "out"


def the_fault(folder: Path, kind: str, where: str) -> Fault:
    found = verify(folder, workers=1)
    hits = [f for f in found.faults if (f.kind, f.where) == (kind, where)]
    assert len(hits) == 1, [str(f) for f in found.faults]
    return hits[0]


def edit_index(folder: Path, **changes: object) -> None:
    document = json.loads((folder / INDEX).read_text())
    document["weight_map"].update(changes.pop("weight_map", {}))
    document["metadata"].update(changes)
    (folder / INDEX).write_text(json.dumps(document))


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    assert "missing" in the_fault(sharded, "index", INDEX).message
    assert "is not here" in the_fault(sharded, "record", SHARD).message


def test_a_truncated_shard_is_named_and_the_others_are_still_read(sharded: Path) -> None:
    for name in (SHARD, "model-00003-of-00004.safetensors"):
        data = (sharded / name).read_bytes()
        (sharded / name).write_bytes(data[:-10])
    assert "truncated" in the_fault(sharded, "header", SHARD).message
    assert "truncated" in the_fault(sharded, "header", "model-00003-of-00004.safetensors").message


def test_a_header_that_is_no_json(sharded: Path) -> None:
    data = bytearray((sharded / SHARD).read_bytes())
    data[9] = 0xFF
    (sharded / SHARD).write_bytes(data)
    assert "UTF-8" in the_fault(sharded, "header", SHARD).message


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    edit_index(sharded, weight_map={"lm_head.weight": SHARD})
    assert f"the index says it lies in {SHARD}" in the_fault(sharded, "index", "lm_head.weight").message


def test_an_index_with_a_tensor_that_no_shard_has(sharded: Path) -> None:
    edit_index(sharded, weight_map={"lm_head.bias": SHARD})
    assert "no shard has it" in the_fault(sharded, "index", "lm_head.bias").message


def test_an_index_that_points_outside(sharded: Path) -> None:
    edit_index(sharded, weight_map={"lm_head.weight": "../elsewhere.safetensors"})
    assert "outside the folder" in the_fault(sharded, "index", INDEX).message


def test_an_index_that_is_no_json(sharded: Path) -> None:
    (sharded / INDEX).write_text("{")
    assert "JSON" in the_fault(sharded, "index", INDEX).message


def test_a_wrong_total_size(sharded: Path) -> None:
    edit_index(sharded, total_size=123)
    assert "total_size 123" in the_fault(sharded, "total-size", INDEX).message


def test_a_total_size_as_two_other_tools_write_it_is_a_note(sharded: Path) -> None:
    # With the record the index would be known to have changed.
    (sharded / "surgeon.json").unlink()
    for total in (0, sum(p.stat().st_size for p in sharded.glob("*.safetensors"))):
        edit_index(sharded, total_size=total)
        found = verify(sharded)
        assert found.is_sound
        assert [n.kind for n in found.notes] == ["total-size"]


def test_one_changed_byte_is_found_by_its_digest_and_named_by_its_tensor(sharded: Path) -> None:
    path = sharded / SHARD
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = verify(sharded)
    assert [f.kind for f in found.faults] == ["digest"]
    assert SHARD in found.faults[0].message
    assert verify(sharded, FIXTURE).faults[0].kind == "bytes"


def test_a_changed_header_is_found_by_its_digest(sharded: Path) -> None:
    path = sharded / SHARD
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"pt"', b'"tf"', 1))
    assert "changed after they were written" in the_fault(sharded, "digest", f"{SHARD} (header)").message


def test_a_shard_that_the_record_does_not_know(sharded: Path) -> None:
    write_shard(sharded / "extra.safetensors", {"model.extra": np.zeros(4, np.float32)})
    edit_index(sharded, weight_map={"model.extra": "extra.safetensors"})
    assert "does not know this shard" in the_fault(sharded, "record", "extra.safetensors").message


def test_a_damaged_record(sharded: Path) -> None:
    (sharded / "surgeon.json").write_text('{"digest": "xxh3_64"}')
    assert "damaged" in the_fault(sharded, "record", "surgeon.json").message


def test_a_leftover_part(sharded: Path) -> None:
    shutil.copy(sharded / SHARD, sharded / f"{SHARD}.partial")
    assert "unfinished" in the_fault(sharded, "leftover", f"{SHARD}.partial").message


def test_the_state_of_an_unfinished_run(sharded: Path) -> None:
    (sharded / ".surgeon").mkdir()
    assert "resume" in the_fault(sharded, "unfinished", ".surgeon").message


def test_a_run_that_was_stopped_before_its_only_shard_was_whole(tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    (folder / ".surgeon").mkdir(parents=True)
    (folder / "model.safetensors.partial").write_bytes(bytes(100))
    assert "resume" in the_fault(folder, "unfinished", "stopped").message


def test_other_weights_beside_are_a_note(sharded: Path) -> None:
    (sharded / "pytorch_model.bin").write_bytes(b"0")
    found = verify(sharded)
    assert found.is_sound
    assert [n.where for n in found.notes] == ["pytorch_model.bin"]


def test_what_is_no_checkpoint_is_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        verify(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        verify(MOE, tmp_path / "nowhere")


def test_a_single_file_is_judged_with_the_config_beside_it(tmp_path: Path) -> None:
    shutil.copy(subject("gptq") / "model.safetensors", tmp_path / "one.safetensors")
    assert [f.kind for f in verify(tmp_path / "one.safetensors").faults] == ["not-in-config"] * 16
    shutil.copy(subject("gptq") / "config.json", tmp_path)
    assert verify(tmp_path / "one.safetensors", MOE).is_sound


def test_one_shard_of_several_is_judged_by_its_header_and_digests(sharded: Path) -> None:
    found = verify(sharded / SHARD)
    assert found.is_sound
    assert [n.kind for n in found.notes] == ["one-shard"]
    assert found.digested_bytes == (sharded / SHARD).stat().st_size
    with pytest.raises(CheckpointError, match="give the folder"):
        verify(sharded / SHARD, FIXTURE)
    data = bytearray((sharded / SHARD).read_bytes())
    data[-1] ^= 1
    (sharded / SHARD).write_bytes(data)
    assert [f.kind for f in verify(sharded / SHARD).faults] == ["digest"]


def test_dropped_tensors_are_excused_by_the_record_and_by_nothing_else(tmp_path: Path) -> None:
    recipe = tmp_path / "drop.yaml"
    recipe.write_text('description: no norm\nsteps:\n  - drop: {where: "model.norm.weight"}\n')
    apply(load_transform(str(recipe)), MOE, tmp_path / "out", workers=1)
    found = verify(tmp_path / "out", MOE)
    assert found.is_sound
    assert [(n.kind, n.where) for n in found.notes if n.kind == "dropped"] == [("dropped", "model.norm.weight")]
    (tmp_path / "out" / "surgeon.json").unlink()
    assert [(f.kind, f.where) for f in verify(tmp_path / "out", MOE).faults] == [("lost", "model.norm.weight")]


def test_renamed_tensors_are_recognised_by_their_bytes(tmp_path: Path) -> None:
    recipe = tmp_path / "rename.yaml"
    recipe.write_text('description: other names\nsteps:\n  - rename: {where: "model.{rest*}", to: "language_model.{rest}"}\n')
    apply(load_transform(str(recipe)), MOE, tmp_path / "out", workers=1)
    found = verify(tmp_path / "out", MOE)
    assert found.is_sound
    renamed = {n.where: n.message for n in found.notes if n.kind == "renamed"}
    assert "language_model.norm.weight" in renamed["model.norm.weight"] or "layernorm" in renamed["model.norm.weight"]


def test_a_cast_is_measured_and_a_wrong_one_found(tmp_path: Path) -> None:
    recipe = tmp_path / "cast.yaml"
    recipe.write_text('description: F16\nsteps:\n  - cast: {where: "model.{rest*}", dtype: F16}\n')
    apply(load_transform(str(recipe)), MOE, tmp_path / "out", workers=1)
    found = verify(tmp_path / "out", MOE)
    assert found.is_sound
    assert min(f.snr_db for f in found.compared) > 60


def test_a_dequantized_checkpoint_is_compared_with_what_it_was_made_from(tmp_path: Path) -> None:
    source = subject("gptq-hybrid")
    apply(load_transform("dequantize", {"fuse_experts": "true"}), source, tmp_path / "float", workers=1)
    found = verify(tmp_path / "float", source)
    assert found.is_sound
    assert len(found.compared) == 96
    assert min(f.snr_db for f in found.compared) > 50


def test_a_repacked_checkpoint_is_exactly_what_it_was_made_from(tmp_path: Path) -> None:
    source = subject("gptq")
    apply(load_transform("repack", {"to": "awq"}), source, tmp_path / "awq", workers=1)
    found = verify(tmp_path / "awq", source)
    assert found.is_sound
    assert {f.snr_db for f in found.compared} == {float("inf")}


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is not valid JSON"), ("3", "should be a mapping in both"), ('{"bits": 4}', "differs from the quantization_config")],
)
def test_a_copy_of_the_config_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    shutil.copytree(subject("gptq"), tmp_path / "out")
    (tmp_path / "out" / "quantize_config.json").write_text(text)
    assert words in the_fault(tmp_path / "out", "config-copy", "quantize_config.json").message


def test_a_copy_of_a_config_that_is_gone(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path / "out")
    (tmp_path / "out" / "quantize_config.json").write_text('{"bits": 4}')
    assert "config.json has no quantization_config" in the_fault(tmp_path / "out", "config-copy", "quantize_config.json").message


@pytest.mark.parametrize(
    ("value", "where", "words"),
    [
        ("gptq", "config.json quantization_config", "expected a mapping, found 'gptq'"),
        ({"quant_method": "gptq5"}, "config.json quantization_config.quant_method", "no reader knows 'gptq5'"),
        (
            {"quant_method": "compressed-tensors", "quantization_status": "compressed", "config_groups": {"g": 3}},
            "config.json quantization_config.config_groups.g",
            "expected a mapping, found 3",
        ),
    ],
)
def test_a_config_of_the_wrong_kind(tmp_path: Path, value: object, where: str, words: str) -> None:
    shutil.copytree(subject("ct-int"), tmp_path / "out")
    (tmp_path / "out" / "surgeon.json").unlink()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    assert words in the_fault(tmp_path / "out", "config", where).message


def test_a_method_of_others_is_noted_and_nothing_is_guessed(tmp_path: Path) -> None:
    shutil.copytree(subject("ct-int"), tmp_path / "out")
    (tmp_path / "out" / "surgeon.json").unlink()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "modelopt"}}))
    found = verify(tmp_path / "out")
    assert found.is_sound
    assert [n.kind for n in found.notes] == ["unknown-method"]

"""``surgeon diff``: what differs between two checkpoints, whatever their shards; exit code 0 only if nothing does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.cli import main
from tensorsurgeon.look.diffing import diff_checkpoints
from tensorsurgeon.verifying import verify
from tests.checkpoints import Tensors, moe_config, tiny_moe, write_checkpoint


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["diff", *map(str, args)])


def pair(folder: Path, changed: Tensors | None = None, **config: object) -> tuple[Path, Path]:
    a = write_checkpoint(folder / "a", tiny_moe(), shards=3, config=moe_config())
    b = write_checkpoint(folder / "b", tiny_moe() if changed is None else changed, config=moe_config(**config))
    return a, b


def test_sharding_is_no_difference(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    result = run(a, b)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"equal: {len(tiny_moe())} tensors are the same")


def test_one_changed_element_is_found_and_placed(tmp_path: Path) -> None:
    changed = tiny_moe()
    changed["model.layers.1.mlp.experts.down_proj"].view(np.uint16)[2, 3, 4] ^= 1
    a, b = pair(tmp_path, changed)
    result = run(a, b, "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["equal"] is False
    (found,) = data["other_bytes"]
    assert found["name"] == "model.layers.1.mlp.experts.down_proj"
    assert found["elements"] == 1
    assert found["first"] == np.ravel_multi_index((2, 3, 4), (4, 16, 8))
    assert data["equal_tensors"] == len(changed) - 1
    assert run(a, b, "--headers-only").exit_code == 0


@pytest.mark.parametrize("chunk", [1 << 12, 6, 64])
def test_differences_are_counted_across_chunks(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tiny_moe()
    flat = changed["model.embed_tokens.weight"].view(np.uint16).reshape(-1)
    flat[[7, 8, 300, 511]] ^= 1
    a, b = pair(tmp_path, changed)
    monkeypatch.setattr("tensorsurgeon.look.diffing.CHUNK_BYTES", chunk)
    (found,) = diff_checkpoints(a, b, workers=2).other_bytes
    assert (found.elements, found.first) == (4, 7)


def test_names_types_shapes_and_config(tmp_path: Path) -> None:
    changed = tiny_moe()
    changed["model.layers.0.self_attn.v_proj.weight"] = changed.pop("model.layers.0.self_attn.k_proj.weight")
    changed["model.rotary.inv_freq"] = changed["model.rotary.inv_freq"].astype(np.float64)
    a, b = pair(tmp_path, changed, hidden_size=17, new_key=None)
    result = run(a, b)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith("different: ")
    assert any(line.startswith("- model.layers.*.self_attn.k_proj.weight") for line in lines)
    assert any(line.startswith("+ model.layers.*.self_attn.v_proj.weight") for line in lines)
    assert any("F32[4] -> F64[4]" in line for line in lines)
    assert "~ config.json hidden_size: 16 -> 17" in lines
    assert "~ config.json new_key: absent -> None" in lines
    data = json.loads(run(a, b, "--json").stdout)
    assert [s["name"] for s in data["only_a"]] == ["model.layers.0.self_attn.k_proj.weight"]
    assert [s["name"] for s in data["only_b"]] == ["model.layers.0.self_attn.v_proj.weight"]
    assert {"key": "new_key", "b": None} in data["config"]


def test_nested_config_keys_have_their_path(tmp_path: Path) -> None:
    a, b = pair(tmp_path, a_key_that_nobody_knows={"kept": 1})
    data = json.loads(run(a, b, "--json").stdout)
    # True and 1 are equal in Python and not in JSON.
    assert data["config"] == [{"key": "a_key_that_nobody_knows.kept", "a": True, "b": 1}]


def test_side_files(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    (a / "tokenizer.json").write_text("{}")
    (b / "tokenizer.json").write_text("[]")
    (b / "vocab.txt").write_text("")
    result = run(a, b)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[1:] == ["+ file vocab.txt", "~ file tokenizer.json"]


def test_what_is_no_checkpoint_is_neither_equal_nor_different(tmp_path: Path) -> None:
    a, _ = pair(tmp_path)
    result = run(a, tmp_path / "nowhere")
    assert result.exit_code == 20
    assert result.stderr.count("\n") == 1


def test_a_large_tensor_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"w": np.zeros((1 << 12, 1 << 10), np.float32)}
    a, b = (write_checkpoint(tmp_path / name, large, config=moe_config()) for name in "ab")
    sizes: list[int] = []
    read = TensorReader.bytes_of

    def watched(self: TensorReader, name: str, start: int, nbytes: int) -> np.ndarray:
        sizes.append(nbytes)
        return read(self, name, start, nbytes)

    monkeypatch.setattr(TensorReader, "bytes_of", watched)
    assert diff_checkpoints(a, b).is_equal
    assert verify(a, b).is_sound
    assert sum(sizes) == 4 * large["w"].nbytes
    assert max(sizes) <= 1 << 20

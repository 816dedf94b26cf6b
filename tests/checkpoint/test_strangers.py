"""A checkpoint is input from a stranger: nothing in it stalls a reader, fills its memory, or reaches for other files."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tensorsurgeon.checkpoint.folder import Checkpoint, open_checkpoint
from tensorsurgeon.errors import CheckpointError, ConfigError, HeaderError, IndexMismatchError
from tests.checkpoints import FIXTURE, INDEX, apply, moe_config, write_checkpoint

TENSORS = {"a.weight": np.zeros((4, 4), np.float32), "b.weight": np.ones((2, 4), np.float32)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m", TENSORS, shards=2, config=moe_config())


def said(checkpoint: Checkpoint) -> str:
    return "\n".join(map(str, checkpoint.oddities))


# --- files that are no files, and files without end ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", INDEX, "config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "sparse"])
def test_what_is_no_file_or_has_no_end_is_refused_at_once(kind: str, name: str, folder: Path) -> None:
    path = folder / name
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "sparse":
            with open(path, "wb") as file:
                file.truncate(40 << 30)
    # In a process of its own: a pipe would be waited for for ever, and memory is that of the process.
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import CheckpointError
try:
    open_checkpoint({str(folder)!r})
except CheckpointError as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() in ("HeaderError", "IndexMismatchError", "ConfigError"), done.stderr


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}", "NaN" * 9])
@pytest.mark.parametrize(("name", "error"), [("config.json", ConfigError), (INDEX, IndexMismatchError)])
def test_json_that_nests_without_end_or_counts_without_end_is_refused(
    name: str, error: type[Exception], content: str, folder: Path
) -> None:
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(error, match=name.replace(".", r"\.")):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["x" * 70_000, "\ud800", "ü" * 200])
def test_an_index_that_names_what_no_file_can_be_called(file: str, folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(IndexMismatchError, match="no file can be called"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["x" * 65_537, "a" + ".b" * 201])
def test_a_name_that_is_no_name(name: str, tmp_path: Path) -> None:
    save_file({name: np.zeros(1, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(HeaderError, match="a name has"):
        open_checkpoint(tmp_path)


def test_names_that_are_long_and_have_many_parts_are_refused_where_there_are_many(tmp_path: Path) -> None:
    """Each alone is a name; all that a hundred megabytes of them begin with would be gigabytes."""
    long = ".".join(["n" * 300] * 200)
    write_checkpoint(tmp_path / "few", {f"{n}.{long}": np.zeros(1, np.int8) for n in range(9)})
    assert len(open_checkpoint(tmp_path / "few").specs) == 9
    write_checkpoint(tmp_path / "many", {f"{n}.{long}": np.zeros(1, np.int8) for n in range(60)})
    with pytest.raises(HeaderError, match="in 201 parts, after many others like it"):
        open_checkpoint(tmp_path / "many")


def test_a_path_that_is_no_path() -> None:
    with pytest.raises(CheckpointError):
        open_checkpoint("a\0b")


def test_a_hundred_thousand_names_are_read_in_seconds(tmp_path: Path) -> None:
    save_file(
        {f"model.layers.{n % 60}.mlp.experts.{n}.w": np.zeros(1, np.int8) for n in range(100_000)}, tmp_path / "m.safetensors"
    )
    began = time.process_time()
    assert len(open_checkpoint(tmp_path).specs) == 100_000
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20


# --- what Git and the Hub leave in place of files -------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", INDEX, "config.json"])
def test_a_pointer_of_git_lfs_is_called_one(name: str, folder: Path) -> None:
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.* run git lfs pull"):
        open_checkpoint(folder)


def test_a_pointer_among_the_side_files_is_told(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(POINTER)
    assert "tokenizer.json is a Git LFS pointer" in said(open_checkpoint(folder))


# --- links ----------------------------------------------------------------------------------------------------------


def test_a_link_out_of_the_checkpoint_is_named_and_not_followed(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("SECRET")
    (folder / "chat_template.jinja").symlink_to(secret)
    (folder / "notes.txt").symlink_to("config.json")
    found = open_checkpoint(folder)
    assert "chat_template.jinja is a link that leads out of the checkpoint" in said(found)
    assert found.side_files == ("notes.txt",)
    apply([], folder, tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert not (tmp_path / "out" / "notes.txt").is_symlink()


def test_a_snapshot_of_the_hub_links_to_its_own_blobs_and_to_no_other(tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    write_checkpoint(snapshot, TENSORS, config=moe_config())
    blobs.mkdir()
    (snapshot / "tokenizer.json").write_text("{}")
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"{number:040x}")
        path.symlink_to(Path("../../blobs") / f"{number:040x}")
    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("another model's")
    (snapshot / "vocab.json").symlink_to(other / "0")
    found = open_checkpoint(snapshot)
    assert found.side_files == ("tokenizer.json",)
    assert "vocab.json is a link that leads out" in said(found)


def test_a_name_that_is_no_utf8_is_told(folder: Path) -> None:
    with open(os.fsencode(folder) + b"/ab\xff.txt", "w"):
        pass
    found = open_checkpoint(folder)
    assert found.side_files == ()
    assert "has a name that is no UTF-8" in said(found)
    found.fingerprint()


# --- what belongs to a checkpoint -----------------------------------------------------------------------------------


def test_where_model_safetensors_exists_it_alone_is_the_model(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", TENSORS, config=moe_config())
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "model-of-before.safetensors"):
        save_file({"other": np.zeros(1, np.int8)}, folder / name)
    found = open_checkpoint(folder)
    assert set(found.specs) == set(TENSORS)
    assert set(found.left_behind) == {"consolidated.safetensors", "adapter_model.safetensors", "model-of-before.safetensors"}


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    save_file({"base.q_proj.lora_A.weight": np.zeros((2, 4), np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter \(LoRA\) only"):
        open_checkpoint(tmp_path)


OTHER_WEIGHTS = (
    "onnx/model.onnx", "onnx/model.onnx_data", "openvino_model.bin", "openvino_model.xml", "rust_model.ot", "optimizer.pt",
    "x.mlpackage/Data/weight.bin", "model.tflite", "mp_rank_00_model_states.pt", "ggml-model-q4.bin", "rng_state_0.pth",
    "adapter_model.bin", "x.gguf", "tf_model.h5", "flax_model.msgpack", "unet/diffusion_pytorch_model.bin",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_weights_in_other_forms_stay_behind_and_are_named(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"weights")
    found = open_checkpoint(folder)
    assert found.side_files == ()
    assert len(found.left_behind) == 1
    assert name.startswith(found.left_behind[0])


def test_layers_that_modules_json_loads_go_along(folder: Path, tmp_path: Path) -> None:
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}, {"path": 7}, "x"]))
    for name in ("2_Dense", "3_Other"):
        (folder / name).mkdir()
        save_file({"linear.weight": np.zeros((2, 2), np.float32)}, folder / name / "model.safetensors")
    assert open_checkpoint(folder).left_behind == ("3_Other/model.safetensors",)
    apply([], folder, tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_bytes() == (
        folder / "2_Dense" / "model.safetensors"
    ).read_bytes()


def test_the_fixture_has_nothing_odd() -> None:
    assert open_checkpoint(FIXTURE).oddities == ()

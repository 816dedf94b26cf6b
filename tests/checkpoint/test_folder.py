"""A source is a folder with or without an index, a single file, or a snapshot of the Hub's cache; and nothing else."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import CheckpointError, ConfigError, HeaderError, IndexMismatchError, MissingTensorError
from tests.checkpoints import INDEX, moe_config, tiny_moe, write_checkpoint, write_snapshot

TENSORS = tiny_moe()
SPECS = {name: array.shape for name, array in TENSORS.items()}


def shapes(checkpoint):
    return {spec.name: spec.shape for spec in checkpoint.specs.values()}


def bytes_at(checkpoint, name):
    place = checkpoint.location(name)
    with open(checkpoint.shards[place.shard].path, "rb") as file:
        file.seek(place.offset)
        return file.read(checkpoint.specs[name].nbytes)


@pytest.mark.parametrize("options", [{"shards": 1}, {"shards": 7}, {"shards": 7, "index": False}, {"shards": 1, "index": True}])
@pytest.mark.parametrize("write", [write_checkpoint, write_snapshot])
def test_however_it_is_sharded_the_facts_are_the_same(write, options, tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "m", TENSORS, config=moe_config(), **options))
    assert shapes(checkpoint) == SPECS
    assert list(checkpoint.specs) == list(open_checkpoint(write_checkpoint(tmp_path / "one", TENSORS)).specs)
    assert all(bytes_at(checkpoint, name) == array.tobytes() for name, array in TENSORS.items())
    assert checkpoint.config["hidden_size"] == 16
    assert checkpoint.oddities == ()
    assert checkpoint.has_index is options.get("index", options["shards"] > 1)
    assert checkpoint.weight_bytes == sum(a.nbytes for a in TENSORS.values())


def test_names_that_differ_only_in_leading_zeros_have_one_order_whatever_the_sharding(tmp_path):
    tensors = {name: np.zeros(1, np.int8) for name in ("l.1", "l.01", "l.001", "l.2")}
    orders = [list(open_checkpoint(write_checkpoint(tmp_path / f"{s}", tensors, shards=2, seed=s)).specs) for s in range(8)]
    assert all(order == orders[0] for order in orders)


def test_a_single_file_brings_its_config_and_nothing_else(tmp_path):
    folder = write_checkpoint(tmp_path / "m", TENSORS, config=moe_config())
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(folder / "model.safetensors")
    assert shapes(checkpoint) == SPECS
    assert checkpoint.is_single_file
    assert checkpoint.config["num_experts"] == 4
    assert checkpoint.side_files == ()


def test_side_files_travel_and_other_weights_stay_behind(tmp_path):
    folder = write_checkpoint(tmp_path / "m", TENSORS, shards=2, config=moe_config())
    for name in ("tokenizer.json", "LICENSE", "sub/deep/chat.jinja", ".gitattributes", "model.py", "training_args.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in (
        "pytorch_model.bin",
        "model.gguf",
        "adapter.safetensors",
        "x.safetensors.partial",
        "original/consolidated.00.pth",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("")
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.side_files) == {
        "tokenizer.json",
        "LICENSE",
        "sub/deep/chat.jinja",
        ".gitattributes",
        "model.py",
        "training_args.bin",
    }
    assert set(checkpoint.left_behind) == {
        "pytorch_model.bin",
        "model.gguf",
        "adapter.safetensors",
        "x.safetensors.partial",
        "original/consolidated.00.pth",
    }


def test_what_cannot_be_copied_is_told(tmp_path):
    folder = write_checkpoint(tmp_path / "m", TENSORS)
    (folder / "broken.json").symlink_to("nowhere")
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe")
    oddities = "\n".join(map(str, open_checkpoint(folder).oddities))
    for name in ("broken.json", "linked/", "pipe"):
        assert name in oddities


def test_the_metadata_of_the_source_is_kept(tmp_path):
    folder = write_checkpoint(tmp_path / "m", TENSORS, shards=2, metadata={"format": "pt", "who": "ü"})
    assert open_checkpoint(folder).metadata == {"format": "pt", "who": "ü"}


@pytest.mark.parametrize("change", ["config", "side_file", "weights"])
def test_the_fingerprint_notices_any_change(change, tmp_path):
    folder = write_checkpoint(tmp_path / "m", TENSORS, config=moe_config())
    (folder / "tokenizer.json").write_text("{}")
    before = open_checkpoint(folder).fingerprint()
    assert open_checkpoint(folder).fingerprint() == before
    match change:
        case "config":
            (folder / "config.json").write_text("{}")
        case "side_file":
            (folder / "tokenizer.json").write_text("{ }")
        case "weights":
            info = os.stat(folder / "model.safetensors")
            write_checkpoint(folder, {**TENSORS, "new": np.zeros(1, np.int8)})
            os.utime(folder / "model.safetensors", ns=(info.st_atime_ns, info.st_mtime_ns))
    assert open_checkpoint(folder).fingerprint() != before


def test_the_fingerprint_knows_no_time_and_no_place(tmp_path):
    for name in "ab":
        folder = write_checkpoint(tmp_path / name, TENSORS, config=moe_config())
        (folder / "tokenizer.json").write_text("{}")
    os.utime(tmp_path / "a" / "model.safetensors", ns=(1, 1))
    os.utime(tmp_path / "a" / "tokenizer.json", ns=(1, 1))
    assert open_checkpoint(tmp_path / "a").fingerprint() == open_checkpoint(tmp_path / "b").fingerprint()


def edit_index(folder, edit):
    document = json.loads((folder / INDEX).read_text())
    edit(document)
    (folder / INDEX).write_text(json.dumps(document))


LM_HEAD = "lm_head.weight"
INDEX_FAULTS = {
    "a_tensor_that_no_shard_has": (
        lambda d: d["weight_map"].update(ghost="model-00001-of-00003.safetensors"),
        IndexMismatchError,
        "ghost: .* no shard has it",
    ),
    "a_tensor_it_does_not_name": (
        lambda d: d["weight_map"].pop(LM_HEAD),
        IndexMismatchError,
        "lm_head.weight: .* the index does not name it",
    ),
    "the_wrong_shard": (
        lambda d: d["weight_map"].update(
            {LM_HEAD: next(f for f in sorted(set(d["weight_map"].values())) if f != d["weight_map"][LM_HEAD])}
        ),
        IndexMismatchError,
        "lm_head.weight: the index says it lies in",
    ),
    "a_shard_that_is_missing": (
        lambda d: d["weight_map"].update(ghost="model-00009-of-00009.safetensors"),
        MissingTensorError,
        "model-00009-of-00009.safetensors missing",
    ),
    "outside": (
        lambda d: d["weight_map"].update({LM_HEAD: "../other/model.safetensors"}),
        IndexMismatchError,
        "outside the folder",
    ),
    "absolute": (lambda d: d["weight_map"].update({LM_HEAD: "/etc/passwd"}), IndexMismatchError, "outside the folder"),
    "dots": (lambda d: d["weight_map"].update({LM_HEAD: ".."}), IndexMismatchError, "outside the folder"),
    "backslash": (lambda d: d["weight_map"].update({LM_HEAD: "..\\x.safetensors"}), IndexMismatchError, "outside the folder"),
    "nul": (lambda d: d["weight_map"].update({LM_HEAD: "a\0b"}), IndexMismatchError, "outside the folder"),
    "empty_file_name": (lambda d: d["weight_map"].update({LM_HEAD: ""}), IndexMismatchError, "outside the folder"),
    "no_weight_map": (lambda d: d.pop("weight_map"), IndexMismatchError, "no weight_map"),
    "weight_map_of_numbers": (lambda d: d["weight_map"].update({LM_HEAD: 3}), IndexMismatchError, "no weight_map"),
    "names_nothing": (lambda d: d["weight_map"].clear(), IndexMismatchError, "names no tensor"),
}


@pytest.mark.parametrize("label", INDEX_FAULTS)
def test_an_index_that_disagrees_is_refused(label, moe):
    edit, error, message = INDEX_FAULTS[label]
    edit_index(moe, edit)
    with pytest.raises(error, match=message):
        open_checkpoint(moe)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b'{"weight_map":' * 100_000, b"[" + b"9" * 5000 + b"]"]
)
def test_an_index_that_is_no_index_is_refused(content, moe):
    (moe / INDEX).write_bytes(content)
    with pytest.raises(IndexMismatchError, match=r"valid JSON|weight_map"):
        open_checkpoint(moe)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b'{"a":' * 100_000, b"[" + b"9" * 5000 + b"]"])
def test_a_config_that_is_no_config_is_refused(content, moe):
    (moe / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_checkpoint(moe)


def test_a_wrong_total_size_is_told_and_forgiven(moe):
    edit_index(moe, lambda d: d["metadata"].update(total_size=5))
    assert any("total_size 5" in oddity.text for oddity in open_checkpoint(moe).oddities)


def test_tolerance_turns_a_stale_index_into_oddities(moe):
    edit_index(moe, lambda d: d["weight_map"].update(ghost="model-00009-of-00009.safetensors"))
    oddities = [str(oddity) for oddity in open_checkpoint(moe, tolerant=True).oddities]
    assert any("model-00009" in o for o in oddities)
    assert any("ghost" in o for o in oddities)


def test_a_missing_shard_is_noticed_without_an_index(tmp_path):
    folder = write_checkpoint(tmp_path / "m", TENSORS, shards=5, index=False)
    (folder / "model-00003-of-00005.safetensors").unlink()
    with pytest.raises(MissingTensorError, match=r"1 are missing, first model-00003-of-00005"):
        open_checkpoint(folder)


def test_a_blob_that_was_not_downloaded_is_noticed(tmp_path):
    snapshot = write_snapshot(tmp_path, TENSORS, shards=3)
    (snapshot / "model-00002-of-00003.safetensors").resolve().unlink()
    with pytest.raises(MissingTensorError, match="model-00002-of-00003"):
        open_checkpoint(snapshot)


def test_a_name_in_two_shards_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "m", TENSORS)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    shutil.copy(folder / "one.safetensors", folder / "other.safetensors")
    with pytest.raises(IndexMismatchError, match="lies in two shards"):
        open_checkpoint(folder)


def test_a_place_that_is_no_checkpoint_is_named_with_what_lies_there(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match=r"no such file or folder; did you mean 'model'"):
        open_checkpoint(tmp_path / "modle")
    with pytest.raises(CheckpointError, match="found: nothing"):
        open_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_text("")
    with pytest.raises(CheckpointError, match=r"found: pytorch_model.bin"):
        open_checkpoint(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"neither a folder nor a .safetensors file"):
        open_checkpoint(tmp_path / "model" / "pytorch_model.bin")


def test_an_unfinished_run_is_no_source(moe):
    (moe / ".surgeon").mkdir()
    open_checkpoint(moe)  # a trace without a name is harmless
    (moe / ".surgeon" / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="finish it with resume=True"):
        open_checkpoint(moe)


def test_a_damaged_shard_is_named(moe):
    path = moe / "model-00002-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(HeaderError, match=r"model-00002-of-00003.safetensors: .*truncated"):
        open_checkpoint(moe)

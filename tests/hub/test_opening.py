"""A model on the Hub is opened from headers and small files, and what a plan transfers is counted by the server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download

from tensorsurgeon.checkpoint.folder import Checkpoint, open_checkpoint
from tensorsurgeon.checkpoint.hub.snapshot import hub_address
from tensorsurgeon.errors import CheckpointError, HeaderError, MissingTensorError
from tests.checkpoints import moe_config, tiny_moe, write_checkpoint
from tests.hub.server import Hub


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("owner/name", ("owner/name", None)),
        ("Qwen/Qwen3.6-35B-A3B", ("Qwen/Qwen3.6-35B-A3B", None)),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("hf://owner/name", ("owner/name", None)),
        ("hf://owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("name", None),
        ("/owner/name", None),
        ("./name", None),
        ("../name", None),
        ("~/name", None),
        ("a/b/c", None),
        ("owner/model.safetensors", None),
        ("owner/na..me", None),
        ("owner/na me", None),
        ("s3://owner/name", None),
    ],
)
def test_what_names_a_model_on_the_hub(text: str, known: tuple[str, str | None] | None) -> None:
    assert hub_address(text) == known


def same(found: Checkpoint, local: Checkpoint) -> None:
    assert list(found.specs.values()) == list(local.specs.values())
    assert found.locations == local.locations
    assert found.config_text == local.config_text
    assert found.side_files == local.side_files
    assert found.left_behind == local.left_behind
    assert found.fingerprint() == local.fingerprint()


@pytest.fixture
def model(moe: Path) -> Path:
    """With what belongs to a model, and what stays behind."""
    (moe / "tokenizer.json").write_text("{}")
    (moe / "README.md").write_text("a model")
    (moe / "extra").mkdir()
    (moe / "extra" / "notes.txt").write_text("notes")
    (moe / "pytorch_model.bin").write_bytes(b"old weights" * 1000)
    return moe


def test_a_model_on_the_hub_is_the_same_as_in_a_folder(hub: Hub, model: Path) -> None:
    repository = hub.storage.add_model("owner/tiny", model)
    found = open_checkpoint("owner/tiny")
    same(found, open_checkpoint(model))
    assert str(found) == f"owner/tiny@{repository.refs['main']}"
    # No weights came, old or new ones.
    shards = {p.name for p in model.glob("*.safetensors")}
    assert not any((found.root / name).exists() for name in (*shards, "pytorch_model.bin"))
    assert not hub.fetched()


def test_a_second_look_fetches_headers_alone(hub: Hub, model: Path) -> None:
    hub.storage.add_model("owner/tiny", model)
    open_checkpoint("owner/tiny")
    hub.requests.clear()
    open_checkpoint("owner/tiny")
    assert {r.path.rpartition("/")[2] for r in hub.requests if "/resolve/" in r.path and r.method == "GET"} == {
        p.name for p in model.glob("*.safetensors")
    }


def test_a_revision_is_what_was_asked_for(hub: Hub, model: Path, tmp_path: Path) -> None:
    repository = hub.storage.add_model("owner/tiny", model)
    first = repository.refs["main"]
    other = write_checkpoint(tmp_path / "other", tiny_moe(layers=1), config=moe_config())
    repository.commit(hub.storage.files_of(other), "main")
    repository.refs["v1"] = first
    local, newer = open_checkpoint(model), open_checkpoint(other)
    same(open_checkpoint(f"owner/tiny@{first}"), local)
    same(open_checkpoint("hf://owner/tiny@v1"), local)
    same(open_checkpoint("owner/tiny"), newer)


def test_what_is_here_wins(hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.storage.add_model("owner/tiny", model)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "owner" / "tiny")
    found = open_checkpoint("owner/tiny")
    assert found.snapshot is None
    assert not hub.requests


def test_a_snapshot_that_is_whole_in_the_cache_needs_no_hub(hub: Hub, model: Path) -> None:
    repository = hub.storage.add_model("owner/tiny", model)
    snapshot_download("owner/tiny")
    hub.requests.clear()
    found = open_checkpoint("owner/tiny")
    assert not hub.requests
    same(found, open_checkpoint(model))
    # It is the Hub's all the same, and known by its commit.
    assert found.snapshot is not None
    assert found.snapshot.commit == repository.refs["main"]
    assert found.identity["tokenizer.json"] == [2, f"git:{repository.files()['tokenizer.json'].git}"]


def test_a_snapshot_with_a_file_missing_is_completed(hub: Hub, model: Path) -> None:
    hub.storage.add_model("owner/tiny", model)
    # As another program left it, which needs no tokenizer.
    snapshot_download("owner/tiny", allow_patterns=["*.safetensors", "*index.json", "config.json"])
    hub.requests.clear()
    same(open_checkpoint("owner/tiny"), open_checkpoint(model))
    assert any("tokenizer.json" in r.path for r in hub.requests)
    assert not any(".safetensors" in r.path for r in hub.requests if "index" not in r.path)


def test_offline_it_has_to_be_in_the_cache(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.storage.add_model("owner/tiny", model)
    open_checkpoint("owner/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match="no such file or folder here, and as a model on the Hub: is not complete in the cache"
    ):
        open_checkpoint("owner/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot_download("owner/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same(open_checkpoint("owner/tiny"), open_checkpoint(model))


def test_a_model_in_one_file_without_an_index(hub: Hub, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "one", tiny_moe(), config=moe_config())
    hub.storage.add_model("owner/one", folder)
    same(open_checkpoint("owner/one"), open_checkpoint(folder))


def test_a_header_longer_than_the_first_request(hub: Hub, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "many", tiny_moe(layers=60), config=moe_config())
    local = open_checkpoint(folder)
    assert len(local.shards[0].raw) > 16 << 10
    hub.storage.add_model("owner/many", folder)
    same(open_checkpoint("owner/many"), local)
    spans = [r.span for r in hub.requests if r.span]
    assert f"bytes=0-{(16 << 10) - 1}" in spans
    assert f"bytes={16 << 10}-{len(local.shards[0].raw) + 7}" in spans


def test_opening_transfers_little(hub: Hub, tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "large", tiny_moe(layers=12, hidden=512, inner=256, experts=8), shards=12, config=moe_config()
    )
    hub.storage.add_model("owner/large", folder)
    total = sum(path.stat().st_size for path in folder.iterdir())
    open_checkpoint("owner/large")
    assert 0 < hub.sent_bytes() < total / 100


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("owner/tiny", {"status": 401, "code": "RepoNotFound"}, "the Hub knows no such model, or it is private"),
        ("owner/tiny", {"status": 403, "code": "GatedRepo"}, "is gated: ask for access on its page"),
        ("owner/tiny@v9", None, "has no such branch, tag or commit"),
        ("owner/none", None, "the Hub knows no such model"),
        ("owner/tiny", {"status": 403}, "the token has no right to this"),
        ("owner/tiny", {"status": 400}, "the Hub refuses"),
    ],
)
def test_faults_that_stay_are_told_at_once(
    hub: Hub, model: Path, waits: list[float], name: str, fault: dict | None, message: str
) -> None:
    hub.storage.add_model("owner/tiny", model)
    if fault:
        hub.faults.add("/api/models", times=99, **fault)
    with pytest.raises(CheckpointError, match=message) as told:
        open_checkpoint(name)
    assert str(told.value).startswith(f"{name}: no such file or folder here, and as a model on the Hub: ")
    assert not waits


def test_a_gated_model_shows_its_files_and_not_their_content(hub: Hub, model: Path, waits: list[float]) -> None:
    hub.storage.add_model("owner/tiny", model, gated=True)
    with pytest.raises(CheckpointError, match=r"owner/tiny/.*: is gated: ask for access on its page"):
        open_checkpoint("owner/tiny")
    assert not waits


def test_a_private_model_is_read_with_a_token(hub: Hub, model: Path, logged_in: str) -> None:
    hub.storage.add_model("owner/tiny", model, private=True)
    same(open_checkpoint("owner/tiny"), open_checkpoint(model))
    assert {r.token for r in hub.requests if "/stored/" in r.path} == {None}


@pytest.mark.parametrize(
    "where", ["/api/models", "GET /owner/tiny/resolve/.*model-00002", "GET /stored", "(HEAD|GET) .*/config.json"]
)
@pytest.mark.parametrize(
    "fault",
    [{"status": 503}, {"status": 500}, {"status": 429, "headers": {"Retry-After": "7"}}, {"cut_after": 10}],
    ids=["503", "500", "429", "cut"],
)
def test_faults_that_pass_are_waited_for(hub: Hub, model: Path, waits: list[float], where: str, fault: dict) -> None:
    if "cut_after" in fault and ("/api/models" in where or "model-00002" in where):
        pytest.skip("the server cuts files only, and answers these with none")
    hub.storage.add_model("owner/tiny", model)
    hub.faults.add(where, times=2, **fault)
    same(open_checkpoint("owner/tiny"), open_checkpoint(model))
    assert hub.faults.happened
    assert sum(waits) > 0
    if fault.get("status") == 429 and "config.json" not in where:
        assert max(waits) >= 7


def test_a_hub_in_trouble_for_long_is_told(hub: Hub, model: Path, waits: list[float]) -> None:
    hub.storage.add_model("owner/tiny", model)
    hub.faults.add("/api/models", times=99, status=503)
    with pytest.raises(CheckpointError, match=r"the Hub is in trouble \(503\); try again later"):
        open_checkpoint("owner/tiny")
    assert waits == [1.0, 3.0, 10.0, 30.0]


def test_a_hub_that_asks_for_too_much_patience_is_told(hub: Hub, model: Path, waits: list[float]) -> None:
    hub.storage.add_model("owner/tiny", model)
    hub.faults.add("/api/models", times=99, status=429, headers={"Retry-After": "3600"})
    with pytest.raises(CheckpointError, match=r"too many requests \(429\), it asks to wait 3600 s"):
        open_checkpoint("owner/tiny")
    assert not waits


def test_a_hub_that_cannot_be_reached(hub: Hub, model: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="the Hub cannot be reached"):
        open_checkpoint("owner/tiny")
    # Nothing was fetched yet: a person without a network is told within seconds.
    assert waits == [1.0, 3.0]


def test_a_mistyped_folder_is_told_at_once(
    hub: Hub, model: Path, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "tiny-moe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError) as told:
        open_checkpoint("models/tiny-meo")
    assert str(told.value).startswith(
        "models/tiny-meo: no such file or folder here, and as a model on the Hub: the Hub cannot be"
    )
    assert str(told.value).endswith("check the connection, or HF_ENDPOINT; did you mean 'tiny-moe'?")
    assert not waits
    # Whoever says that it is a model of the Hub is waited for.
    with pytest.raises(CheckpointError, match="the Hub cannot be reached"):
        open_checkpoint("hf://models/tiny-meo")
    assert waits == [1.0, 3.0]
    # The Hub is asked all the same: a folder beside it says nothing of the name.
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    hub.storage.add_model("models/tiny", model)
    same(open_checkpoint("models/tiny"), open_checkpoint(model))


def test_offline_a_mistyped_folder_is_told_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"models/tiny: no such file or folder here, and .*HF_HUB_OFFLINE is set"):
        open_checkpoint("models/tiny")
    assert not waits
    assert not hub.requests


def test_a_server_without_ranges_is_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "many", tiny_moe(hidden=512), config=moe_config())
    hub.storage.add_model("owner/tiny", folder)
    hub.faults.add("GET /stored", times=9, ignore_range=True)
    with pytest.raises(CheckpointError, match="is not served in parts; download the model and name its folder"):
        open_checkpoint("owner/tiny")


def test_a_header_that_is_none(hub: Hub, model: Path) -> None:
    (model / "model-00002-of-00003.safetensors").write_bytes(b"\xff" * 5000)
    hub.storage.add_model("owner/tiny", model)
    with pytest.raises(HeaderError, match=r"owner/tiny/model-00002-of-00003\.safetensors: the header claims"):
        open_checkpoint("owner/tiny")


def test_a_repository_without_weights(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "none"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(moe_config()))
    hub.storage.add_model("owner/none", folder)
    with pytest.raises(CheckpointError, match=r"owner/none@[0-9a-f]{40}: holds no .safetensors file \(found: config.json\)"):
        open_checkpoint("owner/none")


def test_a_repository_that_lacks_a_shard(hub: Hub, model: Path) -> None:
    (model / "model-00002-of-00003.safetensors").unlink()
    hub.storage.add_model("owner/tiny", model)
    with pytest.raises(MissingTensorError, match=r"the index names 3 shards, but model-00002-of-00003\.safetensors missing"):
        open_checkpoint("owner/tiny")


def test_a_hub_that_says_nothing_is_asked_again(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    hub.storage.add_model("owner/tiny", model)
    monkeypatch.setattr("tensorsurgeon.checkpoint.hub.repository._SECONDS", 0.3)
    monkeypatch.setattr("tensorsurgeon.checkpoint.hub.faults._WAITS", (0.1, 0.1))
    hub.faults.add("GET /stored", stall=1.0)
    same(open_checkpoint("owner/tiny"), open_checkpoint(model))
    assert "the Hub cannot be reached (timed out); check the connection, or HF_ENDPOINT; trying again" in caplog.text

"""The Hub of the tests is one for ``huggingface_hub`` itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

from tests.hub.server import Hub


def test_the_library_downloads_what_was_put_there(hub: Hub, moe: Path) -> None:
    hub.storage.add_model("owner/tiny", moe)
    found = Path(snapshot_download("owner/tiny"))
    assert {p.name for p in found.iterdir()} == {p.name for p in moe.iterdir()}
    assert all((found / p.name).read_bytes() == p.read_bytes() for p in moe.iterdir())
    shards = [p.name for p in moe.glob("*.safetensors")]
    assert hub.fetched() == dict.fromkeys(shards, 1)
    info = HfApi().model_info("owner/tiny", files_metadata=True)
    assert info.sha == hub.storage.repositories["owner/tiny"].refs["main"]
    assert {s.rfilename for s in info.siblings or [] if s.lfs} == set(shards)


def test_a_token_goes_to_the_hub_and_not_to_where_files_are_stored(hub: Hub, moe: Path, logged_in: str) -> None:
    hub.storage.add_model("owner/tiny", moe, private=True)
    shard = next(moe.glob("*.safetensors")).name
    hf_hub_download("owner/tiny", shard)
    assert {r.token for r in hub.requests if "/resolve/" in r.path} == {logged_in}
    assert {r.token for r in hub.requests if "/stored/" in r.path} == {None}


def test_the_library_uploads_a_folder(hub: Hub, moe: Path, logged_in: str, tmp_path: Path) -> None:
    api = HfApi()
    api.create_repo("owner/new", private=True)
    api.upload_folder(repo_id="owner/new", folder_path=moe)
    back = hub.storage.check_out("owner/new", tmp_path / "back")
    assert all((back / p.name).read_bytes() == p.read_bytes() for p in moe.iterdir())
    assert hub.storage.repositories["owner/new"].private


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"status": 403, "code": "GatedRepo"}, errors.GatedRepoError),
        ({"status": 404, "code": "RepoNotFound"}, errors.RepositoryNotFoundError),
        ({"status": 404, "code": "RevisionNotFound"}, errors.RevisionNotFoundError),
        ({"status": 503}, errors.HfHubHTTPError),
    ],
)
def test_faults_are_what_the_library_knows(hub: Hub, moe: Path, fault: dict, error: type[Exception]) -> None:
    hub.storage.add_model("owner/tiny", moe)
    hub.faults.add("/api/models", times=9, **fault)
    with pytest.raises(error):
        HfApi().model_info("owner/tiny")
    assert hub.faults.happened


def test_a_cut_connection_is_one(hub: Hub, moe: Path, waits: list[float]) -> None:
    hub.storage.add_model("owner/tiny", moe)
    shard = next(moe.glob("*.safetensors"))
    hub.faults.add("GET /stored/", cut_after=1000)
    found = Path(hf_hub_download("owner/tiny", shard.name))
    assert found.read_bytes() == shard.read_bytes()
    # The library gives up a chunk of 10 MB that was not whole, so that it begins a small file again.
    assert [r.nbytes for r in hub.requests if "/stored/" in r.path and r.method == "GET"] == [1000, shard.stat().st_size]

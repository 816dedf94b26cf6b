"""``inspect``, ``plan``, ``verify`` and ``diff`` of models on the Hub say what they say of folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.hub import ranges
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.cli import main
from tensorsurgeon.errors import SourceError
from tests.checkpoints import FIXTURE, moe_config, tiny_moe, write_checkpoint
from tests.hub.server import Hub


def surgeon(*arguments: str, code: int = 0) -> Any:
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code not in (0, 70)
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture
def converted(hub: Hub, tmp_path: Path) -> Path:
    """The fixture and a conversion of it, both on the Hub too."""
    surgeon("apply", "quark-w8a8-int8", str(FIXTURE), str(tmp_path / "out"))
    hub.storage.add_model("owner/tiny", FIXTURE)
    hub.storage.add_model("owner/tiny-int8", tmp_path / "out")
    return tmp_path / "out"


def test_inspect(hub: Hub, converted: Path) -> None:
    local = surgeon("inspect", str(converted))
    found = surgeon("inspect", "owner/tiny-int8")
    assert found.pop("path") == "owner/tiny-int8"
    del local["path"]
    assert found == local
    assert found["made_by"]
    assert hub.sent_bytes() < sum(p.stat().st_size for p in converted.iterdir()) / 3


def test_plan(hub: Hub, tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "large", tiny_moe(layers=12, hidden=512, inner=256), shards=12, config=moe_config(hidden=512, inner=256)
    )
    repository = hub.storage.add_model("owner/large", folder)
    found, local = surgeon("plan", "split-experts", "owner/large"), surgeon("plan", "split-experts", str(folder))
    assert found["source"]["path"] == f"owner/large@{repository.refs['main']}"
    for key in ("tensors", "output", "copied_bytes", "steps"):
        assert found[key] == local[key]
    assert 0 < hub.sent_bytes() < sum(p.stat().st_size for p in folder.iterdir()) / 100


def test_verify(hub: Hub, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 100_000)
    local = surgeon("verify", str(converted), "--against", str(FIXTURE))
    found = surgeon("verify", "hf://owner/tiny-int8@main", "--against", "owner/tiny")
    for said, name in ((found.pop("path"), "owner/tiny-int8@"), (found.pop("against"), "owner/tiny@")):
        assert said.startswith(name)
    del local["path"], local["against"]
    assert found == local
    assert local["digested_bytes"]


def test_verify_finds_what_is_damaged_there(hub: Hub, converted: Path) -> None:
    shard = next(p for p in converted.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 0xFF
    shard.write_bytes(content)
    hub.storage.add_model("owner/damaged", converted)
    found = surgeon("verify", "owner/damaged", code=60)
    assert found["faults"] == surgeon("verify", str(converted), code=60)["faults"]
    shard.write_bytes(b"\xff" * 1000)
    hub.storage.add_model("owner/broken", converted)
    found = surgeon("verify", "owner/broken", code=60)
    assert [(f["kind"], f["where"]) for f in found["faults"]] == [("header", shard.name)]


def test_diff(hub: Hub, converted: Path) -> None:
    local = surgeon("diff", str(FIXTURE), str(converted), code=1)
    assert surgeon("diff", "owner/tiny", "owner/tiny-int8", code=1) == local
    assert surgeon("diff", "owner/tiny", str(FIXTURE))["equal"]


def test_bytes_that_cannot_be_had_are_one_message(hub: Hub, converted: Path, waits: list[float]) -> None:
    hub.faults.add("GET /stored", times=2, cut_after=1000)
    assert surgeon("diff", "owner/tiny", str(FIXTURE))["equal"]
    assert waits
    hub.faults.add("GET /stored", times=2, status=503)
    assert surgeon("diff", "owner/tiny", str(FIXTURE))["equal"]


def test_a_file_that_became_another_is_one_message(hub: Hub, converted: Path, waits: list[float]) -> None:
    checkpoint = open_checkpoint("owner/tiny")
    repository = hub.storage.repositories["owner/tiny"]
    name, commit = checkpoint.shards[0].path.name, repository.refs["main"]
    repository.commits[commit] |= {name: hub.storage.add_bytes(b"other" * 1000, name)}
    with TensorReader(checkpoint) as reader, pytest.raises(SourceError, match=f"{name}: the Hub now serves another file"):
        reader.shard_bytes(0, 0, 100)
    assert not waits


def test_a_name_that_is_nothing(hub: Hub) -> None:
    assert refused("inspect", "owner/nothing").startswith(
        "surgeon: owner/nothing: no such file or folder here, and as a model on the Hub: the Hub knows no such model"
    )

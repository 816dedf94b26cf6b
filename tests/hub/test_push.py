"""``surgeon push``: what arrives on the Hub is the checkpoint and no more, and transformers loads it from there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from jsonschema import Draft202012Validator

from tensorsurgeon import api
from tensorsurgeon.cli import main
from tensorsurgeon.cli.schema import SCHEMAS
from tensorsurgeon.errors import PublishError, RecipeError, VerifyError
from tests.checkpoints import FIXTURE
from tests.hub.conversions import contents
from tests.hub.server import Hub

pytestmark = pytest.mark.usefixtures("logged_in")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that transformers loads: the fixture's floats in other shards."""
    out = tmp_path_factory.mktemp("made") / "out"
    api.apply(api.plan("split-experts", FIXTURE, max_shard_size="300KB"), out)
    return out


@pytest.fixture
def target(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "target"))


def push(target: Path, *options: str, name: str = "owner/out") -> Result:
    return CliRunner().invoke(main, ["push", str(target), name, *options])


def test_what_arrives_is_the_checkpoint_and_nothing_else(hub: Hub, target: Path, tmp_path: Path) -> None:
    expected = contents(target)
    (tmp_path / "secret").write_text("a key")
    (target / "link.txt").symlink_to(tmp_path / "secret")
    (target / "model-00009.safetensors.partial").write_bytes(b"half")
    (target / "pytorch_model.bin").write_bytes(b"other weights")
    (target / ".cache" / "huggingface").mkdir(parents=True)
    (target / ".cache" / "huggingface" / "x.metadata").write_text("x")
    # Faults by what lies beside it: a partial file is one.
    (target / "model-00009.safetensors.partial").unlink()
    done = push(target)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{hub.endpoint}/owner/out\n"
    assert "private, commit" in done.stderr
    repository = hub.storage.repositories["owner/out"]
    assert repository.private
    back = hub.storage.check_out("owner/out", tmp_path / "back")
    (back / ".gitattributes").unlink()
    assert contents(back) == expected


def test_partial_files_and_the_state_of_a_run_never_go(hub: Hub, target: Path) -> None:
    (target / "x.safetensors.partial").write_bytes(b"half")
    assert push(target, "--anyway").exit_code == 0
    assert not any("partial" in name for name in hub.storage.repositories["owner/out"].files())
    (target / ".surgeon").mkdir()
    (target / ".surgeon" / "run.json").write_text("{}")
    done = push(target, "--anyway", name="owner/unfinished")
    assert done.exit_code == 20
    assert "holds an unfinished run of surgeon" in done.stderr
    assert "owner/unfinished" not in hub.storage.repositories


def test_json_says_where_it_lies(hub: Hub, target: Path) -> None:
    found = json.loads(push(target, "--json", "--quiet").stdout)
    Draft202012Validator(SCHEMAS["push"]).validate(found)
    repository = hub.storage.repositories["owner/out"]
    assert found["address"] == f"{hub.endpoint}/owner/out"
    assert found["commit"] == repository.refs["main"]
    assert found["private"] is True
    assert found["files"] == len(repository.files()) - 1  # .gitattributes is the Hub's


def test_public_is_said(hub: Hub, target: Path) -> None:
    assert push(target, "--public").exit_code == 0
    assert not hub.storage.repositories["owner/out"].private
    # It is there now, and whoever pushes again must know that everybody sees it.
    done = push(target)
    assert done.exit_code == 45
    assert "owner/out: is there and is public: whoever looks would see this; say so with --public" in done.stderr
    with pytest.raises(PublishError, match="say so with public=True"):
        api.push(target, "owner/out")
    assert api.push(target, "owner/out", public=True).private is False


def test_faults_stop_it(hub: Hub, target: Path) -> None:
    shard = sorted(target.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 0xFF
    shard.write_bytes(content)
    done = push(target)
    assert done.exit_code == 60
    assert done.stderr.startswith(f"surgeon: {target}: is not pushed, for it has faults: ")
    assert done.stderr.endswith("look at them with surgeon verify, or push it with --anyway\n")
    assert not hub.requests
    with pytest.raises(VerifyError, match="push it with anyway=True"):
        api.push(target, "owner/out")
    assert push(target, "--anyway").exit_code == 0
    assert shard.name in hub.storage.repositories["owner/out"].files()


def test_an_upload_that_was_stopped_goes_on(hub: Hub, target: Path, waits: list[float]) -> None:
    shards = sorted(target.glob("*.safetensors"))
    last = hub.storage.add_file(shards[-1], "x").sha256
    del hub.storage.blobs[last]
    hub.faults.add(f"PUT /stored/{last}", times=99, status=500)
    done = push(target)
    assert done.exit_code == 45
    assert "owner/out: the Hub is in trouble (500); try again later" in done.stderr
    assert len(hub.storage.repositories["owner/out"].commits) == 1
    hub.faults.clear()
    hub.requests.clear()
    assert push(target).exit_code == 0
    put = [r.path.rpartition("/")[2] for r in hub.requests if r.method == "PUT"]
    assert put == [last]
    hub.requests.clear()
    # And once more, when all is there.
    assert push(target).exit_code == 0
    assert not [r for r in hub.requests if r.method == "PUT"]


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429, "headers": {"Retry-After": "2"}}])
@pytest.mark.parametrize("where", ["GET /api/models", "repos/create", "preupload", "objects/batch", "PUT", "POST .*/commit"])
def test_faults_that_pass(hub: Hub, target: Path, waits: list[float], where: str, fault: dict) -> None:
    hub.faults.add(where, times=2, **fault)
    done = push(target)
    assert done.exit_code == 0, done.output
    assert hub.faults.happened


def test_without_the_right_to_write(hub: Hub, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.add("POST /api/repos/create", times=9, status=403)
    done = push(target)
    assert done.exit_code == 45
    assert "owner/out: the token has no right to this (403)" in done.stderr
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the Hub does not take the token (401)" in push(target).stderr
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token to write to the Hub with; log in with `hf auth login`" in push(target).stderr


@pytest.mark.parametrize("name", ["out", "owner/out@v1", "/owner/out", "a/b/c"])
def test_a_name_that_is_none(target: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="is no name on the Hub; give owner/name"):
        api.push(target, name)


def test_transformers_loads_it_from_there(hub: Hub, target: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    # Fused again, as its class wants the experts.
    api.apply(api.plan("fuse-experts", target), tmp_path / "fused")
    assert push(tmp_path / "fused", name="owner/fused").exit_code == 0
    hub.requests.clear()
    config = transformers.AutoConfig.from_pretrained("owner/fused")
    model_class = getattr(transformers, config.architectures[0])
    pushed = model_class.from_pretrained("owner/fused", dtype=torch.float32)
    here = model_class.from_pretrained(FIXTURE, dtype=torch.float32)
    assert any("/owner/fused/resolve/" in r.path for r in hub.requests)
    ids = torch.arange(12)[None] % 50
    with torch.no_grad():
        assert torch.equal(pushed(input_ids=ids).logits, here(input_ids=ids).logits)

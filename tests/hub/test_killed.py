"""A streamed conversion is killed at ten points and goes on: the same bytes, and no shard comes twice that had come."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tensorsurgeon import api
from tests.calibrate.models import TEXT
from tests.checkpoints import FIXTURE
from tests.hub.conversions import contents, in_shards, shard_names
from tests.hub.server import Hub

ROOT = Path(__file__).parents[2]
Reached = Callable[[Path], bool]


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    """As a person sets it: the library's own variables, in a process of its own."""
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip


def start(hub: Hub, tmp_path: Path, target: Path, *more: str, transform: str = "split-experts") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tensorsurgeon", "apply", transform, "owner/large", str(target)]
    options = ["--workers", "2", "--max-shard-size", "3MB", *more]
    with open(tmp_path / "said", "ab") as said:
        return subprocess.Popen([*command, *options], env=environment(hub, tmp_path / "cache"), stdout=said, stderr=said)


def asked_for(hub: Hub) -> list[str]:
    """Shards in the order in which they were asked for as a whole."""
    hub.settle()
    names = {blob.sha256: name for name, blob in hub.storage.repositories["owner/large"].files().items()}
    whole = [r for r in hub.requests if r.method == "GET" and r.span is None and "/stored/" in r.path]
    return [names[r.path.rpartition("/")[2]] for r in whole]


def sent(hub: Hub, count: int) -> Reached:
    return lambda _: len(hub.fetched_so_far()) >= count


def on_its_way(hub: Hub, count: int) -> Reached:
    return lambda _: len(hub.fetched_so_far()) >= count and hub.under_way > 0


def journalled(lines: int) -> Reached:
    def reached(target: Path) -> bool:
        journal = target / ".surgeon" / "journal.jsonl"
        return journal.exists() and journal.read_bytes().count(b"\n") >= lines

    return reached


def exists(pattern: str) -> Reached:
    return lambda target: any(target.glob(pattern))


@pytest.fixture
def model(tmp_path: Path, hub: Hub) -> Path:
    folder = in_shards(tmp_path / "model")
    hub.storage.add_model("owner/large", folder)
    api.apply(api.plan("split-experts", folder, max_shard_size="3MB"), tmp_path / "local")
    return folder


@pytest.mark.parametrize("point", [pytest.param(k, marks=[] if k % 4 == 1 else pytest.mark.slow) for k in range(10)])
def test_killed_and_resumed(hub: Hub, model: Path, tmp_path: Path, point: int) -> None:
    points = [
        exists(".surgeon/run.json"), exists(".surgeon/spool"), journalled(1), on_its_way(hub, 2), sent(hub, 4), journalled(5),
        sent(hub, 8), journalled(11), exists("*.safetensors"), exists("surgeon.json"),
    ]  # fmt: skip
    killed_and_resumed(hub, tmp_path, model, points[point], random.Random(point).random() * 0.02)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def killed_and_resumed(
    hub: Hub, tmp_path: Path, model: Path, point: Reached, later: float, *options: str, transform: str = "split-experts"
) -> None:
    """Into the folder ``out``: killed ``later`` seconds after a point is reached, resumed; no shard comes again that had come."""
    hub.seconds_per_mb = 0.05
    target = tmp_path / "out"
    run = start(hub, tmp_path, target, *options, transform=transform)
    while not point(target):
        assert run.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.0005)
    time.sleep(later)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    before = asked_for(hub)
    # Shards come one after another: only the last may have been on its way.
    finished = {p.name for p in target.glob(".surgeon/spool/*.safetensors")} | set(before[:-1])
    hub.requests.clear()
    hub.seconds_per_mb = 0.0
    again = start(hub, tmp_path, target, *options, "--resume", transform=transform)
    assert again.wait(600) == 0, (tmp_path / "said").read_text()
    assert not (target / ".surgeon").exists()
    came = asked_for(hub)
    assert len(came) == len(set(came))
    assert not finished & set(came)
    # All that is left came now; of the one that was on its way, what was needed may have been done.
    assert set(shard_names(model)) - finished - set(came) <= set(before[-1:])


def test_resume_goes_on_with_the_commit_although_the_branch_moved(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.seconds_per_mb = 0.05
    target = tmp_path / "out"
    run = start(hub, tmp_path, target)
    while not journalled(4)(target):
        assert run.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.0005)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 130
    assert "stopped" in (tmp_path / "said").read_text()
    (model / "README.md").write_text("other words")
    hub.storage.repositories["owner/large"].commit(hub.storage.files_of(model))
    hub.seconds_per_mb = 0.0
    command = [sys.executable, "-m", "tensorsurgeon", "resume", str(target)]
    done = subprocess.run(command, env=environment(hub, tmp_path / "cache"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(target) == contents(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 30, 100])
def test_a_calibrated_run_is_killed_and_resumed(hub: Hub, tmp_path: Path, lines: int) -> None:
    """In the first layer, between layers, and near the end."""
    api.apply(api.plan("split-experts", FIXTURE, max_shard_size="1MB"), tmp_path / "model")
    hub.storage.add_model("owner/large", tmp_path / "model")
    options = ["--calibration", str(TEXT), "--samples", "4", "--sequence-length", "64"]
    whole, target = tmp_path / "whole", tmp_path / "out"
    assert start(hub, tmp_path, whole, *options, transform="ct-w4a16-g32").wait(120) == 0, (tmp_path / "said").read_text()
    hub.requests.clear()
    run = start(hub, tmp_path, target, *options, transform="ct-w4a16-g32")
    while not journalled(lines)(target):
        assert run.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.0005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    again = start(hub, tmp_path, target, *options, "--resume", transform="ct-w4a16-g32")
    assert again.wait(120) == 0, (tmp_path / "said").read_text()
    for path in (*whole.glob("*.safetensors"), whole / "config.json", whole / "model.safetensors.index.json"):
        assert (target / path.name).read_bytes() == path.read_bytes()
    assert not (target / ".surgeon").exists()
    # A layer is done again from its beginning, so that its shards may come again; those of layers that were done do not.
    assert max(hub.fetched().values()) <= 2


CALIBRATED = ["--calibration", "builtin", "--samples", "4", "--sequence-length", "64"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The fixture in shards that follow its layers, and what a run that nobody disturbs makes of that folder."""
    work = tmp_path_factory.mktemp("calibrated")
    api.apply(api.plan("split-experts", FIXTURE, max_shard_size="1MB"), work / "model")
    command = [sys.executable, "-m", "tensorsurgeon", "apply", "gptq-int4-g128", str(work / "model"), str(work / "out"), "-q"]
    options = [*CALIBRATED, "--max-shard-size", "3MB"]
    subprocess.run([*command, *options], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    return work / "model", work / "out"


@pytest.mark.slow
@pytest.mark.parametrize("point", range(10))
def test_a_calibrated_run_is_killed_at_ten_points(hub: Hub, calibrated: tuple[Path, Path], tmp_path: Path, point: int) -> None:
    """Before the first layer, within layers, between them (24 linears each), and while the output is published."""
    points = [
        exists(".surgeon/run.json"), exists(".surgeon/spool"), sent(hub, 1), sent(hub, 4), sent(hub, 7), journalled(1),
        journalled(25), journalled(49), journalled(73), exists("*.safetensors"),
    ]  # fmt: skip
    model, whole = calibrated
    hub.storage.add_model("owner/large", model)
    later = random.Random(point).random() * 0.1
    killed_and_resumed(hub, tmp_path, model, points[point], later, *CALIBRATED, transform="gptq-int4-g128")
    for path in (*whole.glob("*.safetensors"), whole / "config.json", whole / "model.safetensors.index.json"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()

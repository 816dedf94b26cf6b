"""What nodes of another machine may lack is found before the run: the file system, the source, our version."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tensorsurgeon as ts
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import PlanError, TargetError
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.recipes.library import load_transform
from tests.checkpoints import FIXTURE, moe_config, tiny_moe, write_checkpoint
from tests.running.clusters import cluster_of, wait_for_nodes

pytest.importorskip("ray", reason="pip install 'tensorsurgeon[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")

ROOT = Path(__file__).parents[2]


def planned(source: Path) -> Plan:
    return make_plan(load_transform("quark-w8a8-int8"), open_checkpoint(source))


def start_elsewhere(address: str, *, before: str = "", **more: str) -> subprocess.Popen[bytes]:
    """A node started by hand, as on another machine; ``before`` is what is done to its view of the files."""
    ray = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
    start = f"exec {ray} start --address={address} --num-cpus=1 --object-store-memory=80000000 --block"
    return subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"{before} {start}"], env={**os.environ, **more}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=30)


@pytest.fixture
def elsewhere(monkeypatch):
    """A cluster with a second node that may be started by hand."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("nobody here may give a process its own view of the files")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    started = []
    with cluster_of(1) as cluster:

        def start(**given: str) -> str:
            started.append(start_elsewhere(cluster.address, **given))
            import ray

            ray.init(address=cluster.address, log_to_driver=False, logging_level="critical")
            try:
                wait_for_nodes(2)
            finally:
                ray.shutdown()
            return cluster.address

        yield start
        for process in started:
            end(process)


def test_a_file_system_that_is_not_shared_is_found_before_the_run(elsewhere, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    address = elsewhere(before=f"mount -t tmpfs none {target} &&")
    with pytest.raises(TargetError, match=r"node .*does not see what this machine writes") as told:
        ts.apply(planned(FIXTURE), target, ray=address)
    assert str(target) in str(told.value)
    assert not list(target.iterdir())


@pytest.mark.slow
def test_a_source_that_is_not_there_is_found_before_the_run(elsewhere, tmp_path):
    source = write_checkpoint(tmp_path / "source", tiny_moe(), shards=2, config=moe_config())
    address = elsewhere(before=f"mount -t tmpfs none {source} &&")
    with pytest.raises(TargetError, match=r"node .*does not see .*/source/"):
        ts.apply(planned(source), tmp_path / "out", ray=address)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_version_on_a_node_is_found_before_the_run(elsewhere, tmp_path):
    shutil.copytree(ROOT / "tensorsurgeon", tmp_path / "old" / "tensorsurgeon", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "old" / "tensorsurgeon" / "version.py").write_text('__version__ = "0.0.1"\n')
    address = elsewhere(before=f"mount --bind {tmp_path / 'old' / 'tensorsurgeon'} {ROOT / 'tensorsurgeon'} &&")
    with pytest.raises(PlanError, match=r"has tensorsurgeon 0\.0\.1, and this machine"):
        ts.apply(planned(FIXTURE), tmp_path / "out", ray=address)
    assert not (tmp_path / "out").exists()

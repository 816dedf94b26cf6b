"""Several machines through Ray: real nodes on this machine, never a stand-in, and the bytes of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import tensorsurgeon as ts
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import BudgetError, Interrupted, NumericError, RecipeError
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan
from tests.checkpoints import FIXTURE, folder_bytes, moe_config, tiny_moe, write_checkpoint
from tests.running.clusters import add_node, cluster_of, kill_worker, large

pytest.importorskip("ray", reason="pip install 'tensorsurgeon[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _import_path():
    """Nodes find the package that is tested, wherever they are started from."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def cluster(_import_path):
    import ray

    with cluster_of(2) as cluster:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="critical")
        yield cluster
        ray.shutdown()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "w4"
    run_plan(planned("ct-w4a16-g32", FIXTURE), target)
    return target


def planned(transform: str, source: Path, **parameters: str) -> Plan:
    return make_plan(load_transform(transform, parameters), open_checkpoint(source))


def surgeon(*words: str, **more) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tensorsurgeon", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, **more)


CASES = [
    ("quark-w8a8-int8", {}, False),
    pytest.param("nvfp4a16", {}, False, marks=pytest.mark.slow),
    pytest.param("split-experts", {}, False, marks=pytest.mark.slow),
    ("dequantize", {}, True),
    ("repack", {"to": "gptq", "inexact_scales": "round"}, True),
]


@pytest.mark.parametrize(("transform", "parameters", "of_packed"), CASES)
def test_two_nodes_give_the_bytes_of_one_process(transform, parameters, of_packed, packed, cluster, tmp_path):
    plan = planned(transform, packed if of_packed else FIXTURE, **parameters)
    ts.apply(plan, tmp_path / "here")
    ts.apply(plan, tmp_path / "there", ray=cluster.address)
    assert folder_bytes(tmp_path / "there") == folder_bytes(tmp_path / "here")


@pytest.mark.slow
def test_three_nodes_give_the_bytes_of_one_process(cluster, tmp_path):
    node = add_node(cluster)
    try:
        for transform in ("quark-w8a8-int8", "fp8-block"):
            plan = planned(transform, FIXTURE)
            ts.apply(plan, tmp_path / f"{transform}-here")
            ts.apply(plan, tmp_path / f"{transform}-there", ray=cluster.address)
            assert folder_bytes(tmp_path / f"{transform}-there") == folder_bytes(tmp_path / f"{transform}-here")
    finally:
        cluster.remove_node(node)


def test_a_process_that_dies_costs_its_units_only(cluster, tmp_path):
    plan = planned("quark-w8a8-int8", large(tmp_path / "source", 200))
    ts.apply(plan, tmp_path / "here")
    seen: list[int] = []

    def progress(nbytes: int) -> None:
        seen.append(nbytes)
        if len(seen) == 3:
            assert kill_worker(cluster.head_node) or kill_worker(cluster.worker_nodes.copy().pop())

    ts.apply(plan, tmp_path / "there", ray=cluster.address, progress=progress)
    assert len(seen) == len(plan.units)
    assert folder_bytes(tmp_path / "there") == folder_bytes(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True], ids=["by the nodes", "by this machine"])
def test_a_driver_that_is_killed_is_resumed(cluster, alone, tmp_path):
    source = large(tmp_path / "source", 600)
    assert surgeon("apply", "quark-w8a8-int8", str(source), str(tmp_path / "here"), "-q").returncode == 0
    words = ["apply", "quark-w8a8-int8", str(source), str(tmp_path / "there"), "-q", "--ray", cluster.address]
    journal = tmp_path / "there" / ".surgeon" / "journal.jsonl"
    with subprocess.Popen([sys.executable, "-m", "tensorsurgeon", *words], stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (journal.exists() and journal.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    lines = journal.read_text().count("\n")
    assert lines
    more = ["--ray", "none"] if alone else []
    done = surgeon("resume", str(tmp_path / "there"), "--json", "-q", *more)
    assert done.returncode == 0, done.stderr
    assert f'"resumed_units": {lines}' in done.stdout
    assert folder_bytes(tmp_path / "there") == folder_bytes(tmp_path / "here")


@pytest.mark.slow
def test_a_stopped_run_keeps_what_is_done(cluster, tmp_path):
    plan = planned("quark-w8a8-int8", large(tmp_path / "source", 400))
    stop = threading.Event()
    from tensorsurgeon.running.machines import machines_at

    with machines_at(cluster.address, None, None) as machines:
        with pytest.raises(Interrupted, match="what is done is kept"):
            run_plan(plan, tmp_path / "there", machines=machines, stop=stop, progress=lambda _: stop.set())
        result = run_plan(plan, tmp_path / "there", machines=machines, resume=True)
    assert result.resumed_units
    run_plan(plan, tmp_path / "here")
    assert folder_bytes(tmp_path / "there") == folder_bytes(tmp_path / "here")


def test_an_error_of_a_unit_is_told_as_on_one_machine(cluster, tmp_path):
    tensors = tiny_moe()
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] = np.inf
    plan = planned("quark-w8a8-int8", write_checkpoint(tmp_path / "source", tensors, shards=2, config=moe_config()))
    with pytest.raises(NumericError) as here:
        ts.apply(plan, tmp_path / "here")
    with pytest.raises(NumericError) as there:
        ts.apply(plan, tmp_path / "there", ray=cluster.address)
    assert str(there.value) == str(here.value)


def test_a_node_too_small_is_told_with_the_number(cluster, tmp_path):
    plan = planned("quark-w8a8-int8", FIXTURE)
    small = plan.peak_unit_bytes - 1
    with pytest.raises(BudgetError, match=r"max_ram|at least"):
        ts.apply(plan, tmp_path / "there", ray=cluster.address, max_ram=small)
    assert not (tmp_path / "there").exists()


def test_a_cluster_that_is_not_there_is_one_message(tmp_path):
    done = surgeon("apply", "split-experts", str(FIXTURE), str(tmp_path / "out"), "--ray", "127.0.0.1:1")
    assert done.returncode == RecipeError.exit_code
    assert "nobody answers there" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(RecipeError, match="give HOST:PORT"):
        ts.apply(planned("split-experts", FIXTURE), tmp_path / "out", ray="somewhere")
    with pytest.raises(RecipeError, match="has joined it"):
        ts.apply(planned("split-experts", FIXTURE), tmp_path / "out", ray="ray://127.0.0.1:10001")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_line_starts_one_here(tmp_path):
    assert surgeon("apply", "quark-w8a8-int8", str(FIXTURE), str(tmp_path / "here"), "-q").returncode == 0
    done = surgeon("apply", "quark-w8a8-int8", str(FIXTURE), str(tmp_path / "there"), "--ray", "auto", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")
    assert folder_bytes(tmp_path / "there") == folder_bytes(tmp_path / "here")

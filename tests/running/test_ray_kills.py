"""A node killed at a random moment of a run, again and again: it costs time and no byte."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import tensorsurgeon as ts
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.recipes.library import load_transform
from tests.checkpoints import folder_bytes
from tests.running.clusters import add_node, cluster_of, kill_node, large

pytest.importorskip("ray", reason="pip install 'tensorsurgeon[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")]

KILLS = 6


def test_nodes_killed_in_the_middle_cost_no_byte(tmp_path, monkeypatch):
    import ray

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    rng = random.Random(14)
    plan = make_plan(load_transform("quark-w8a8-int8"), open_checkpoint(large(tmp_path / "source", 300)))
    ts.apply(plan, tmp_path / "here")
    wanted = folder_bytes(tmp_path / "here")
    with cluster_of(1) as cluster:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="critical")
        try:
            for number in range(KILLS):
                node = add_node(cluster)
                moment = rng.uniform(0.0, 0.7) * plan.output_bytes
                written = 0
                at = None

                def progress(nbytes: int, node=node, moment=moment) -> None:
                    nonlocal written, at
                    written += nbytes
                    if written >= moment and at is None:
                        at = written
                        kill_node(cluster, node)

                target = tmp_path / f"there-{number}"
                ts.apply(plan, target, ray=cluster.address, progress=progress, overwrite=True)
                assert at is not None
                assert at < written
                assert folder_bytes(target) == wanted, f"kill {number} after {at} of {written} bytes"
        finally:
            ray.shutdown()

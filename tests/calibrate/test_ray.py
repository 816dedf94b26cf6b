"""Calibrated runs on the nodes of a real Ray cluster: the bytes of one machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.run import run_calibrated
from tensorsurgeon.errors import RecipeError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.quant.gptq.gptq import GptqOptions
from tensorsurgeon.quant.gptq.polish import Polish
from tensorsurgeon.running.machines import machines_at
from tests.calibrate.models import comparable, options_of, plan_of, save_random
from tests.checkpoints import FIXTURE
from tests.running.clusters import add_node, cluster_of, kill_node

pytest.importorskip("ray", reason="pip install 'tensorsurgeon[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")

POLISHED = {"gptq": GptqOptions(polish=Polish())}


@pytest.fixture(scope="module")
def cluster():
    import ray

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    try:
        with cluster_of(2) as cluster:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="critical")
            yield cluster
            ray.shutdown()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def on_nodes(cluster, plan: Plan, target: Path, options: CalibrationOptions, **more):
    with machines_at(cluster.address, None, None) as machines:
        return run_calibrated(plan, target, options, machines=machines, **more)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        # Signed scales: targets lean, so that original states go along.
        ({"signed": True}, {"samples": 40, "sequence_length": 96, **POLISHED}),
        pytest.param({}, {"samples": 24, "experts": "all", "expert_hessian": "own"}, marks=pytest.mark.slow),
        pytest.param({}, {"sequential": False, "experts": "routed"}, marks=pytest.mark.slow),
        pytest.param({"method": "imatrix"}, {}, marks=pytest.mark.slow),
    ],
)
def test_two_nodes_give_the_bytes_of_one_process(fields, options, cluster, tmp_path):
    plan, chosen = plan_of(FIXTURE, **fields), options_of(**options)
    run_calibrated(plan, tmp_path / "here", chosen, workers=2)
    on_nodes(cluster, plan, tmp_path / "there", chosen)
    assert comparable(tmp_path / "there") == comparable(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral"])
def test_other_models_give_the_bytes_of_one_process(kind, cluster, tmp_path):
    source = save_random(tmp_path / "model", kind)
    plan, chosen = plan_of(source), options_of(**POLISHED)
    run_calibrated(plan, tmp_path / "here", chosen, workers=2)
    on_nodes(cluster, plan, tmp_path / "there", chosen)
    assert comparable(tmp_path / "there") == comparable(tmp_path / "here")

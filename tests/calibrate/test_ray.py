"""Calibrated runs on the nodes of a real Ray cluster: the bytes of one machine."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from pathlib import Path

import pytest

from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.calibrate.run import run_calibrated
from tensorsurgeon.errors import BudgetError, Interrupted, RecipeError
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.quant.gptq.gptq import GptqOptions
from tensorsurgeon.quant.gptq.polish import Polish
from tensorsurgeon.running.machines import machines_at
from tests.calibrate.models import comparable, options_of, plan_of, write_ids
from tests.calibrate.test_quantized_sources import gptq_plan
from tests.checkpoints import FIXTURE
from tests.families import build
from tests.running.clusters import add_node, cluster_of, kill_node

pytest.importorskip("ray", reason="pip install 'tensorsurgeon[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")

KILLS = 4
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
        pytest.param({"layout": "ct-nvfp4", "num_bits": None, "group_size": None}, {}, marks=pytest.mark.slow),
        pytest.param({"layout": "hf-fp8", "num_bits": None, "group_size": None}, {}, marks=pytest.mark.slow),
    ],
)
def test_two_nodes_give_the_bytes_of_one_process(fields, options, cluster, tmp_path):
    plan, chosen = plan_of(FIXTURE, **fields), options_of(**options)
    run_calibrated(plan, tmp_path / "here", chosen, workers=2)
    on_nodes(cluster, plan, tmp_path / "there", chosen)
    assert comparable(tmp_path / "there") == comparable(tmp_path / "here")


KINDS = {
    "llama": "a class without experts",
    "gpt_oss": "experts transposed and with biases",
    "llama4_text": "every token goes to every expert",
    "dbrx": "experts below each other",
    "gemma3n_text": "layers hand on more than states: this machine alone",
    "mamba2": "states in F32",
    "qwen3_moe_fp8": "an FP8 source",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_decoder_gives_the_bytes_of_one_process(name, cluster, tmp_path, caplog):
    build.write(name, tmp_path)
    # Four batches, the last shorter than the others.
    chosen = options_of(write_ids(tmp_path / "ids.npy", rows=100, vocabulary=400), samples=100, **POLISHED)
    plan = gptq_plan(tmp_path / "source")
    run_calibrated(plan, tmp_path / "here", chosen, workers=2)
    on_nodes(cluster, plan, tmp_path / "there", chosen)
    assert ("this machine alone" in caplog.text) == ("this machine alone" in KINDS[name])
    assert comparable(tmp_path / "there") == comparable(tmp_path / "here")


@pytest.mark.slow
def test_a_run_begun_on_nodes_goes_on_here_and_the_other_way_round(cluster, tmp_path):
    plan, chosen = plan_of(FIXTURE, signed=True), options_of(samples=40, sequence_length=96)
    run_calibrated(plan, tmp_path / "here", chosen, workers=2)
    for name, begun_there in (("there", True), ("back", False)):
        stop = threading.Event()
        caught = logging.getLogger("tensorsurgeon.calibrate.driver")
        handler = _StopAfterALayer(stop)
        caught.addHandler(handler)
        level = caught.level
        caught.setLevel(logging.INFO)
        try:
            for resume in (False, True):
                run = run_calibrated if begun_there == resume else lambda *given, **more: on_nodes(cluster, *given, **more)
                if resume:
                    run(plan, tmp_path / name, chosen, resume=True)
                else:
                    with pytest.raises(Interrupted):
                        run(plan, tmp_path / name, chosen, stop=stop)
        finally:
            caught.removeHandler(handler)
            caught.setLevel(level)
        assert comparable(tmp_path / name) == comparable(tmp_path / "here")


class _StopAfterALayer(logging.Handler):
    def __init__(self, stop: threading.Event) -> None:
        super().__init__()
        self._stop = stop

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("layer %d of 0 to %d"):
            self._stop.set()


def test_what_is_for_one_machine_is_refused(cluster, tmp_path):
    with pytest.raises(RecipeError, match="SignRound tunes a layer on one machine"):
        on_nodes(cluster, plan_of(FIXTURE, method="signround"), tmp_path / "out", options_of())
    with pytest.raises(RecipeError, match=r"statistics are kept by one machine.*leave write_statistics or ray away"):
        on_nodes(cluster, plan_of(FIXTURE), tmp_path / "out", options_of(write_statistics=tmp_path / "kept"))
    plan = plan_of(FIXTURE)
    with (
        machines_at(cluster.address, None, plan.peak_unit_bytes) as machines,
        pytest.raises(BudgetError, match=r"node .*give a max_ram of at least"),
    ):
        run_calibrated(plan, tmp_path / "out", options_of(), machines=machines)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nodes_killed_in_the_middle_cost_no_byte(cluster, tmp_path):
    plan, chosen = plan_of(FIXTURE, signed=True), options_of(samples=40, sequence_length=96, **POLISHED)
    run_calibrated(plan, tmp_path / "here", chosen, workers=2)
    began = time.monotonic()
    on_nodes(cluster, plan, tmp_path / "whole", chosen)
    seconds = time.monotonic() - began
    rng = random.Random(14)
    killed = 0
    for number in range(KILLS):
        node = add_node(cluster)
        over = threading.Event()
        moment = rng.uniform(0.2, 0.8) * seconds

        def kill(node=node, over=over, moment=moment) -> None:
            nonlocal killed
            killed += not over.wait(moment)
            kill_node(cluster, node)

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            on_nodes(cluster, plan, tmp_path / f"there-{number}", chosen)
        finally:
            over.set()
            thread.join()
        assert comparable(tmp_path / f"there-{number}") == comparable(tmp_path / "here"), f"killed after {moment:.1f} s"
    assert killed >= KILLS // 2

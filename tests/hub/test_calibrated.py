"""Calibration of a model on the Hub: the bytes of a folder's, and few shards come twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tensorsurgeon import api
from tensorsurgeon.calibrate.log import LOG_NAME, read_log
from tensorsurgeon.errors import SourceError
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.report import plan_as_data
from tests.calibrate.models import options_of, plan_of, save_random, write_ids
from tests.checkpoints import FIXTURE, read_all, write_checkpoint
from tests.hub.conversions import contents, fetched_once, shard_names, watched
from tests.hub.server import Hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The fixture in shards that follow its layers."""
    api.apply(api.plan("split-experts", FIXTURE, max_shard_size="150KB"), tmp_path / "split")
    api.apply(api.plan("fuse-experts", tmp_path / "split", max_shard_size="300KB"), tmp_path / "model")
    assert len(shard_names(tmp_path / "model")) > 4
    return tmp_path / "model"


def result(target: Path) -> dict[str, Any]:
    """All but the seconds in the log, which are in no digest."""
    return contents(target) | {LOG_NAME: [row._replace(seconds=0.0) for row in read_log(target / LOG_NAME)]}


def calibrate(plan: Plan, target: Path, **more: Any) -> None:
    api.apply(plan, target, calibration=options_of(), **more)


def test_the_bytes_are_those_of_a_folder(hub: Hub, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.storage.add_model("owner/tiny", model)
    calibrate(plan_of(model), tmp_path / "local")
    plan = plan_of("owner/tiny")
    said = api.describe(plan)
    with watched(tmp_path / "out") as seen, caplog.at_level("INFO", "tensorsurgeon.calibrate"):
        calibrate(plan, tmp_path / "out", ahead=1)
    assert result(tmp_path / "out") == result(tmp_path / "local")
    assert not (tmp_path / "out" / ".surgeon").exists()
    counts = hub.fetched()
    assert counts.keys() == set(shard_names(model))
    twice = sorted(name for name, count in counts.items() if count > 1)
    # The plan and the run said which.
    assert max(counts.values()) <= 2
    if twice:
        assert f"; {len(twice)} come twice, for layers are walked first" in said
        assert any(f"{len(twice)} of {len(counts)} shards come twice: {', '.join(twice)}" in text for text in caplog.messages)
    else:
        assert "come twice" not in said + "".join(caplog.messages)
    assert seen["shards"] < len(counts)


def test_shards_in_the_order_of_layers_come_once(hub: Hub, tmp_path: Path) -> None:
    """What no layer holds lies at both ends, with the first layers and the last."""
    save_random(tmp_path / "llama", "llama")
    api.apply(api.plan([], tmp_path / "llama", max_shard_size="12KB"), tmp_path / "model")
    hub.storage.add_model("owner/llama", tmp_path / "model")
    ids = write_ids(tmp_path / "ids.npy")
    options = options_of(ids)
    api.apply(plan_of(tmp_path / "model", group_size=16), tmp_path / "local", calibration=options)
    plan = plan_of("owner/llama", group_size=16)
    assert "come twice" not in api.describe(plan)
    api.apply(plan, tmp_path / "out", calibration=options)
    assert result(tmp_path / "out") == result(tmp_path / "local")
    fetched_once(hub, shard_names(tmp_path / "model"))


@pytest.mark.slow
def test_stopped_by_a_fault_it_goes_on(hub: Hub, model: Path, tmp_path: Path) -> None:
    repository = hub.storage.add_model("owner/tiny", model)
    calibrate(plan_of(model), tmp_path / "local")
    plan = plan_of("owner/tiny")
    last = shard_names(model)[-2]
    hub.faults.add(f"GET /stored/{repository.files()[last].sha256}", times=99, status=403)
    with pytest.raises(SourceError, match=f"owner/tiny/{last}: the token has no right to this"):
        calibrate(plan, tmp_path / "out")
    hub.faults.clear()
    came = set(hub.fetched())
    hub.requests.clear()
    calibrate(plan, tmp_path / "out", resume=True)
    assert result(tmp_path / "out") == result(tmp_path / "local")
    # The first layers were done; of their shards none comes again, the embeddings' are read by ranges.
    assert sum(hub.fetched().values()) < len(shard_names(model))
    assert not came & set(hub.fetched())


def test_the_record_has_both(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.storage.add_model("owner/tiny", model)
    calibrate(plan_of("owner/tiny"), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "surgeon.json").read_text())
    assert found["source"]["hub"]["repository"] == "owner/tiny"
    assert found["calibration"]["sources"]
    assert api.verify(tmp_path / "out", against="owner/tiny").is_sound


@pytest.mark.slow
def test_layers_that_lie_in_shards_anyhow(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Tensors dealt out at random, and nothing kept for later layers: shards come again, and nobody waits for ever."""
    monkeypatch.setattr("tensorsurgeon.planning.pace.KEPT_LAYERS", 0)
    monkeypatch.setattr("tensorsurgeon.calibrate.layer_shards.KEPT_LAYERS", 0)
    config = json.loads((FIXTURE / "config.json").read_text())
    write_checkpoint(tmp_path / "model", read_all(FIXTURE), shards=40, config=config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURE / name, tmp_path / "model" / name)
    hub.storage.add_model("owner/dealt", tmp_path / "model")
    calibrate(plan_of(tmp_path / "model"), tmp_path / "local")
    dealt = plan_of("owner/dealt")
    twice = plan_as_data(dealt)["streaming"]["twice"]
    assert f"; {len(twice)} come twice, for layers are walked first: {', '.join(twice[:4])}" in api.describe(dealt)
    with caplog.at_level("INFO", "tensorsurgeon.calibrate"):
        calibrate(dealt, tmp_path / "out", ahead=1)
    assert result(tmp_path / "out") == result(tmp_path / "local")
    said = next(text for text in caplog.messages if "shards come twice" in text)
    again = {name for name, count in hub.fetched().items() if count > 1}
    assert again
    assert all(name in said for name in again)


@pytest.mark.slow
def test_a_quantized_model_gives_the_bytes_of_a_folder(hub: Hub, model: Path, tmp_path: Path) -> None:
    """Layers are read from codes and scales, whose names the model's weights do not have."""
    api.apply(api.plan("ct-w4a16-g32", model, max_shard_size="150KB"), tmp_path / "coded")
    assert len(shard_names(tmp_path / "coded")) > 4
    hub.storage.add_model("owner/coded", tmp_path / "coded")
    for name, source in (("local", str(tmp_path / "coded")), ("out", "owner/coded")):
        step = Quantize(
            where=("{path*}.layers.{n}.{module*}_proj.weight",),
            format="ct-packed",
            group_size=64,
            exclude=("mtp.{rest*}",),
            method="gptq",
        )
        calibrate(api.plan(step, source), tmp_path / name)
    assert result(tmp_path / "out") == result(tmp_path / "local")
    assert max(hub.fetched().values()) <= 2

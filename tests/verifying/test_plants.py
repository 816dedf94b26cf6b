"""A slice of the planted faults (``make plants`` has all of them), and no alarm where nothing was planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorsurgeon.ops.registry import op_named
from tensorsurgeon.verifying import verify
from tests.calibrate.commands import FEW, calibrate
from tests.checkpoints import FIXTURE, apply
from tests.verifying.plants.ground import KINDS
from tests.verifying.plants.suite import PLANTED_IN, SHARDED, WITH_ALL_FILES, plant_all
from tests.verifying.subjects import RECIPES, write_shard

FEWER = [name for name in PLANTED_IN if name != WITH_ALL_FILES]


@pytest.mark.parametrize("number", range(len(FEWER)), ids=FEWER)
def test_planted_faults_are_found(number: int, tmp_path: Path) -> None:
    outcomes = plant_all(FEWER[number], tmp_path, KINDS[number :: 2 * len(FEWER)])
    assert outcomes
    missed = [(o.kind, mode) for o in outcomes for mode in ("source and record", "record") if not o.found[mode]]
    assert not missed


def test_kinds_are_many_and_each_has_a_place() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 114
    assert SHARDED in PLANTED_IN


FORMATS = {
    name: {"format": settings["format"], **({"group_size": int(settings["group_size"])} if "group_size" in settings else {})}
    for name, (transform, settings, _) in RECIPES.items()
    if transform == "quantize-linears" and "symmetric" not in settings and "num_bits" not in settings
}


@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_real_shapes_raise_no_alarm(name: str, tmp_path: Path) -> None:
    """Heavy tails, rows of very different size, and inputs that are outliers, as trained weights have them."""
    rng = np.random.default_rng(7)
    weight = rng.standard_t(4, (384, 2048)) * np.exp(rng.normal(0, 0.7, (384, 1)))
    weight[:, rng.integers(0, 2048, 8)] *= 12
    weight[17] = 0
    (tmp_path / "source").mkdir()
    tensors = {"model.layers.0.mlp.up_proj.weight": (weight * 0.02).astype(np.float32)}
    write_shard(tmp_path / "source" / "model.safetensors", tensors)
    (tmp_path / "source" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    step = op_named("quantize")(where=("{path*}.weight",), **FORMATS[name])
    apply([step], tmp_path / "source", tmp_path / "out", workers=1)
    for has_record in (True, False):
        if not has_record:
            (tmp_path / "out" / "surgeon.json").unlink()
        found = verify(tmp_path / "out", tmp_path / "source", workers=1)
        assert not found.faults, [str(f) for f in found.faults]
        assert found.compared


CALIBRATED = {
    "gptq": ("ct-w4a16-g32", ()),
    "gptq without search": ("ct-w4a16-g32", ("--no-search", "--no-polish")),
    "imatrix": ("ct-w4a16-g32", ("--set", "method=imatrix")),
    "asymmetric": ("quantize-linears", ("--set", "format=ct-packed", "--set", "num_bits=4", "--set", "group_size=32",
                                         "--set", "symmetric=false")),
    "three bits": ("quantize-linears", ("--set", "format=ct-packed", "--set", "num_bits=3", "--set", "group_size=32")),
    "two bits": ("quantize-linears", ("--set", "format=ct-packed", "--set", "num_bits=2", "--set", "group_size=32")),
    "per channel": ("quantize-linears", ("--set", "format=ct-packed", "--set", "num_bits=4", "--set", "group_size=-1")),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_codes_raise_no_alarm(name: str, tmp_path: Path) -> None:
    transform, options = CALIBRATED[name]
    text = FIXTURE.parent / "text" / "calibration.txt"
    method = () if "method=imatrix" in options else ("--set", "method=gptq")
    calibrate(tmp_path / "out", *method, *options, "--calibration", text, *FEW, transform=transform)
    for has_record in (True, False):
        if not has_record:
            (tmp_path / "out" / "surgeon.json").unlink()
        found = verify(tmp_path / "out", FIXTURE, workers=1)
        assert not found.faults, [str(f) for f in found.faults]
        assert found.compared

"""A stopped run goes on at its layer also where layers hand on more than hidden states, and only from what was written there."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tensorsurgeon.calibrate.run import run_calibrated
from tensorsurgeon.calibrate.state import CalibrationState, Reached
from tensorsurgeon.calibrate.walk.carried import Carried
from tensorsurgeon.calibrate.walk.walk import Walk
from tests.calibrate.models import comparable, options_of, plan_of
from tests.families import build
from tests.families.table import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = np.random.default_rng(5).integers(3, 400, (6, 40))
STOP = 2

# Layers that reuse the choice of an earlier one; keys and values that later layers share, in a container that layers fill.
MORE: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": {"num_hidden_layers": 3, "indexer_types": ["full", "shared", "shared"], "index_topk": 8},
    "gemma3n_text": {},
}


class Stopped(Exception):
    """The run dies here."""


def run(folder: Path, target: Path, resume: bool = False) -> None:
    np.save(folder / "ids.npy", TOKENS)
    options = options_of(folder / "ids.npy", samples=len(TOKENS), sequence_length=40)
    run_calibrated(plan_of(folder / "source"), target, options, workers=2, resume=resume)


@pytest.fixture(scope="module", params=MORE)
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """The source's folder, what a run leaves that dies in the third layer, and what one makes that does not."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    run_layer = Walk.run_layer

    def dying(self: Walk, number: int, *rest: Any, **more: Any) -> None:
        run_layer(self, number, *rest, **more)
        if number == STOP and rest[2] is not None:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        family = FAMILIES[name]
        patch.setitem(FAMILIES, name, family._replace(config={**family.config, "num_hidden_layers": 4, **MORE[name]}))
        build.write(name, folder)
        run(folder, folder / "whole")
        if name == "glm_moe_dsa":
            # Its third layer is the last, which puts nothing out.
            advance = CalibrationState.advance

            def stopping(self: CalibrationState, reached: Reached, *rest: Any) -> Reached:
                made = advance(self, reached, *rest)
                if made.layer == STOP:
                    raise Stopped
                return made

            patch.setattr(CalibrationState, "advance", stopping)
        else:
            patch.setattr(Walk, "run_layer", dying)
        with pytest.raises(Stopped):
            run(folder, folder / "stopped")
    return folder, folder / "stopped", comparable(folder / "whole")


def resumed(folder: Path, target: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that a resumed run calls."""
    called: list[int] = []
    run_layer = Walk.run_layer

    def noting(self: Walk, number: int, *rest: Any, **more: Any) -> None:
        called.append(number)
        run_layer(self, number, *rest, **more)

    monkeypatch.setattr(Walk, "run_layer", noting)
    with caplog.at_level(logging.WARNING):
        run(folder, target, resume=True)
    return called


def test_it_goes_on_at_its_layer_and_makes_the_same_bytes(
    stopped: tuple[Path, Path, dict[str, bytes]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, left, whole = stopped
    target = Path(shutil.copytree(left, tmp_path / "out"))
    assert list((target / ".surgeon").glob("carried-*.pt"))
    assert min(resumed(folder, target, caplog, monkeypatch)) == STOP
    assert comparable(target) == whole


def newest(folder: Path) -> Path:
    """What the layer that stopped is called with, not what it was about to write, nor what the layers before had written."""
    layers = {path: int(path.stem.rpartition("-")[2]) for path in folder.glob("carried-*.pt")}
    return max((path for path, layer in layers.items() if layer <= STOP), key=lambda path: (layers[path], path.name))


def spoil(folder: Path) -> None:
    path = newest(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose(folder: Path) -> None:
    newest(folder).unlink()


@pytest.mark.parametrize("damage", [spoil, lose])
def test_what_is_not_what_was_written_sends_it_back(
    stopped: tuple[Path, Path, dict[str, bytes]],
    damage: Callable[[Path], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, left, whole = stopped
    target = Path(shutil.copytree(left, tmp_path / "out"))
    for path in (target / ".surgeon").glob("carried-text*.pt"):
        path.unlink()  # made again from the texts
    damage(target / ".surgeon")
    assert min(resumed(folder, target, caplog, monkeypatch)) == 0
    assert "handed on beside hidden states" in caplog.text
    assert comparable(target) == whole


def test_values_that_layers_fill_are_kept_as_they_were_before_the_layer_that_stopped(tmp_path: Path) -> None:
    carried = Carried(tmp_path, torch.device("cpu"))
    for layer in range(5):
        carried.put("box", 0, {"a": torch.full((3,), layer)}, layer)
        carried.put("made", 0, torch.ones(2), 1)
    before = {layer: carried.digest(layer) for layer in (2, 3, 4)}
    assert len(set(before.values())) == 3
    again = Carried(tmp_path, torch.device("cpu"))
    again.restore(3)
    assert torch.equal(again.get("box", 0)["a"], torch.full((3,), 3))
    assert again.digest(3) == before[3]
    assert not list(tmp_path.glob("carried-box-0-4.pt"))
    again.clear()
    assert not list(tmp_path.iterdir())
    assert not again.has("made", 0)

"""`surgeon apply` with calibration as its user types it, and what is then on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner

from tensorsurgeon.cli import main
from tensorsurgeon.planning.rewriting import steps_of
from tensorsurgeon.recipes.library import load_transform
from tests.checkpoints import FIXTURE, apply, read_all

FEW = ("--samples", "4", "--sequence-length", "64")


def surgeon(*arguments: object) -> Any:
    return CliRunner().invoke(main, list(map(str, arguments)))


def calibrate(target: Path, *options: object, transform: str = "ct-w4a16-g32", source: Path = FIXTURE) -> str:
    """What a run that must succeed says on stderr."""
    result = surgeon("apply", transform, source, target, *options)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return str(result.stderr)


def refused(target: Path, *options: object, code: int = 10, source: Path = FIXTURE) -> str:
    """The one message of a run that must fail with ``code``, without a traceback and without anything published."""
    result = surgeon("apply", "ct-w4a16-g32", source, target, "--quiet", *options)
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert not [*target.glob("*.safetensors"), *target.glob("config.json")]
    lines = [line for line in result.stderr.splitlines() if line.startswith("surgeon: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return str(lines[0])


def record(target: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((target / "surgeon.json").read_text())["calibration"]
    return found


def weights_of(target: Path, work: Path) -> dict[str, np.ndarray]:
    """The weights that a reader of the output computes with."""
    apply(steps_of(load_transform("dequantize", {})), target, work, workers=1)
    return read_all(work)


def assert_finite(target: Path, work: Path) -> None:
    """No NaN and no infinity among the tensors on disk, nor among the weights that they stand for."""
    for folder in (read_all(target), weights_of(target, work)):
        for name, array in folder.items():
            assert array.dtype.kind in "iu" or np.isfinite(array.astype(np.float32)).all(), name

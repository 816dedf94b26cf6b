"""What the engine tests share: checkpoints to judge, how to ask a script inside an engine's environment, distances."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import FIXTURE

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HELDOUT = FIXTURE.parent / "text" / "heldout.txt"
CALIBRATION = FIXTURE.parent / "text" / "calibration.txt"
DENSE = FIXTURE.parent / "golden" / "models" / "source-qwen3"

Row = dict[str, Any]


@dataclass(frozen=True)
class Conversion:
    """A transform, its settings and, where codes are chosen by calibration, how: what a test quantizes with."""

    transform: str
    settings: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()

    def __str__(self) -> str:
        calibrated = ("calibrated",) if self.calibration else ()
        return "-".join((self.transform, *self.settings, *calibrated)).replace("=", "-")

    def then_dequantized(self, dtype: str = "BF16") -> tuple[Conversion, Conversion]:
        return self, Conversion("dequantize", (f"dtype={dtype}",))


def conversion(transform: str, *settings: str) -> Conversion:
    return Conversion(transform, settings)


def calibrated(transform: str) -> Conversion:
    """A published conversion as its user calibrates it, on a fifth of the text to save time: 10 s, with all of it 26 s.

    What vLLM scores is the same: GPTQ 20.948, compressed-tensors 21.052; with all of the text 20.941 and 21.073.
    """
    return Conversion(transform, (), ("--calibration", str(CALIBRATION), "--samples", "64", "--sequence-length", "256"))


def in_format(name: str, *settings: str) -> Conversion:
    """Every linear of the decoder layers in a format that no published conversion is named after."""
    return Conversion("quantize-linears", (f"format={name}", *settings))


@dataclass(frozen=True)
class Engine:
    """An engine's interpreter, and what to call it in messages."""

    name: str
    python: Path

    def ask(self, script: str, *arguments: object, timeout: float = 1800, settings: tuple[str, ...] = ()) -> dict[str, Row]:
        """Run a script of this folder and return its JSON lines by the name of the checkpoint's folder.

        ``settings``: NAME=VALUE, added to its environment.

        An engine's own messages share its output, so other lines are passed over; without any JSON line the script itself
        failed, and the test fails with its last words.
        """
        command = [str(self.python), str(HERE / script), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
        environment |= dict(setting.split("=", 1) for setting in settings)
        run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)
        rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        if not rows:
            pytest.fail(f"{self.name}: {script} ended with {run.returncode} and said {run.stderr[-2000:]}")
        return {Path(row["path"]).name: row for row in rows}

    def accepted(self, rows: dict[str, Row], checkpoint: Path) -> Row:
        """The row of a checkpoint that the engine loaded; else the test fails with the engine's own words."""
        row = rows.get(checkpoint.name, {"error": "no answer"})
        if "error" in row:
            pytest.fail(f"{self.name} refused {checkpoint.name}: {row['error']}")
        return row


class Judgement:
    """Logits of checkpoints, all from one process, and what they were loaded into."""

    def __init__(self, engine: Engine, folder: Path, tokens: Path, checkpoints: list[Path]) -> None:
        self.engine, self.folder = engine, folder
        self.rows = engine.ask("transformers_logits.py", folder, *checkpoints, "--tokens", tokens)

    def logits(self, checkpoint: Path) -> np.ndarray:
        self.engine.accepted(self.rows, checkpoint)
        return np.load(self.folder / f"{checkpoint.name}.npy")

    def equal(self, source: Path, quantized: Path, dequantized: Path) -> dict[str, int]:
        """Fail unless the two have equal logits that are not the source's; the modules that the quantized one has."""
        found, wanted, original = map(self.logits, (quantized, dequantized, source))
        assert np.isfinite(found).all(), f"{self.engine.name}: {quantized.name} has logits that are not finite"
        apart, moved = rms(found - wanted), rms(wanted - original)
        print(f"{quantized.name}: {apart:.6f} from its dequantized weights, which are {moved:.5f} from the source")
        assert moved > 0, f"{dequantized.name} has the logits of {source.name}: nothing was quantized"
        assert np.array_equal(found, wanted), (
            f"{self.engine.name}: logits of {quantized.name} are {apart:.6f} (rms) from those of its dequantized weights, "
            f"which are {moved:.6f} from {source.name}"
        )
        modules: dict[str, int] = self.rows[quantized.name]["modules"]
        return modules


def write_tokens(path: Path) -> Path:
    """Token ids for the dense model, whose vocabulary has 64 words: 8 sequences of 100, seeded."""
    tokens = np.random.default_rng(0).integers(0, 64, (8, 100))
    path.write_text(json.dumps(tokens.tolist()))
    return path


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))

"""Published conversions whose codes calibration chose: `surgeon verify` passes, and transformers judges two of them.

W8A16 is served by no vLLM on a CPU, W4A16 g32 by none on a CPU with AMX; where vLLM serves them, test_vllm.py asks it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tensorsurgeon.calibrate.log import LOG_NAME, read_log
from tests.checkpoints import FIXTURE, read_all
from tests.engines.conftest import Convert
from tests.engines.judging import HELDOUT, Conversion, Engine, Judgement, calibrated, conversion

pytestmark = pytest.mark.engine

# Linears whose codes GPTQ chooses, and those of the vision tower, which no text reaches, rounded to nearest.
CALIBRATED: dict[Conversion, tuple[int, int]] = {
    calibrated("gptq-int4-g128"): (96, 0),
    (w4a16 := calibrated("ct-w4a16-g32")): (121, 0),
    (w8a16 := calibrated("ct-w8a16")): (100, 10),
}

# Bounds of the change of perplexity and of the KL divergence from BF16 (nats a token). Measured:
#
#                                     W8A16   perplexity   KL           W4A16 g32   perplexity   KL
#   calibrated                                  +.02 %      .00024                    +.60 %      .0047
#   rounded to nearest                          +.06        .00033                    +.81        .0089
#   bound                                        .1         .0004                     1.0         .006
#   every code one too large                    +.04        .00061
#   one of 32 up_proj, rows reversed           +1.33        .0120                    +2.01        .0167
#   scales reversed                           +23.2         .183
BOUNDS: dict[Conversion, tuple[float, float]] = {w8a16: (0.001, 0.0004), w4a16: (0.01, 0.006)}


@pytest.mark.parametrize("made", CALIBRATED, ids=str)
def test_verify_passes_on_codes_that_gptq_chose(convert: Convert, made: Conversion) -> None:
    checkpoint = convert(FIXTURE, made)
    surgeon = Path(sys.executable).with_name("surgeon")
    run = subprocess.run([surgeon, "verify", checkpoint, "--against", FIXTURE], check=False, capture_output=True, text=True)
    assert run.returncode == 0, f"surgeon verify {made} ended with {run.returncode}: {run.stdout}{run.stderr}"
    methods = Counter(row.method for row in read_log(checkpoint / LOG_NAME))
    assert (methods["gptq"], methods["rtn"]) == CALIBRATED[made]
    # Rounding to nearest gives other codes: what is judged here is not what the tests without calibration judge.
    rounded, chosen = read_all(convert(FIXTURE, conversion(made.transform))), read_all(checkpoint)
    assert rounded.keys() == chosen.keys()
    differ = sum(rounded[name].tobytes() != codes.tobytes() for name, codes in chosen.items() if codes.dtype == np.int32)
    assert differ >= sum(CALIBRATED[made])


@pytest.fixture(scope="module")
def judgement(transformers: Engine, convert: Convert, tmp_path_factory: pytest.TempPathFactory) -> Judgement:
    """What transformers loads with compressed-tensors, and its dequantized weights, on the text that vLLM scores."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("logits")
    ids = AutoTokenizer.from_pretrained(FIXTURE)(HELDOUT.read_text())["input_ids"][: 24 * 250]
    (folder / "tokens.json").write_text(json.dumps(np.reshape(ids, (24, 250)).tolist()))
    checkpoints = [convert(FIXTURE, *steps) for made in BOUNDS for steps in ((made,), made.then_dequantized())]
    return Judgement(transformers, folder, folder / "tokens.json", [FIXTURE, *checkpoints])


@pytest.mark.parametrize("made", BOUNDS, ids=str)
def test_calibrated_codes_in_transformers(judgement: Judgement, convert: Convert, made: Conversion) -> None:
    judgement.equal(FIXTURE, convert(FIXTURE, made), convert(FIXTURE, *made.then_dequantized()))
    tokens = np.array(json.loads((judgement.folder / "tokens.json").read_text()))[:, 1:, None]

    def logprobs(checkpoint: Path) -> np.ndarray:
        logits = judgement.logits(checkpoint)[:, :-1].astype(np.float64)
        return logits - np.logaddexp.reduce(logits, axis=2, keepdims=True)

    def perplexity(predicted: np.ndarray) -> float:
        return float(np.exp(-np.take_along_axis(predicted, tokens, axis=2).mean()))

    source, found = logprobs(FIXTURE), logprobs(convert(FIXTURE, made))
    change = perplexity(found) / perplexity(source) - 1
    divergence = float((np.exp(source) * (source - found)).sum(2).mean())
    print(f"{made}: perplexity {perplexity(found):.4f}, {change:+.3%} of BF16, KL {divergence:.6f}")
    assert perplexity(source) < 25
    assert abs(change) <= BOUNDS[made][0]
    assert divergence <= BOUNDS[made][1]

"""Evaluations equal what transformers' own logits say, in every layout that is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorsurgeon.evaluating.options import TextOptions
from tensorsurgeon.evaluating.result import Evaluation
from tensorsurgeon.evaluating.run import evaluate
from tensorsurgeon.evaluating.text import load_text
from tensorsurgeon.formats.registry import FORMATS
from tests.checkpoints import FIXTURE
from tests.evaluating.judging import HELDOUT, convert, figures, load, log_probabilities

TEXT = TextOptions(locations=(str(HELDOUT),), samples=4, sequence_length=128)
# What the format's default scheme is not, or where two schemes tell more.
SETTINGS: dict[str, dict[str, Any]] = {
    "ct-packed": {"num_bits": 4, "group_size": 32},
    "gptq": {"num_bits": 4, "group_size": 64},
    "gptq-v2": {"num_bits": 4, "group_size": 64},
    "awq": {"num_bits": 4, "group_size": 64},
    "autoround": {"num_bits": 4, "group_size": 64},
    "autoround-awq": {"num_bits": 4, "group_size": 64},
    "quark-int4": {"group_size": 64},
    "quark-int4-reorder": {"group_size": 64},
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    # Four outputs are no whole word of codes.
    narrow = {"also_exclude": ["{p*}.in_proj_a.weight", "{p*}.in_proj_b.weight"]}
    return {
        name: convert("quantize-linears", FIXTURE, folder / name, format=name, **narrow, **SETTINGS.get(name, {}))
        for name in FORMATS
    }


@pytest.fixture(scope="module")
def evaluation(converted: dict[str, Path]) -> Evaluation:
    """All of them in one walk of the source, weights alone: that is what dequantized weights are."""
    return evaluate(list(converted.values()), TEXT, against=FIXTURE, float_inputs=True, workers=2)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return load_text(TEXT, FIXTURE, 2048).tokens


@pytest.fixture(scope="module")
def original(tokens: np.ndarray) -> Any:
    return log_probabilities(load(FIXTURE), tokens)


@pytest.mark.parametrize("name", FORMATS)
def test_every_layout_is_as_far_from_the_source_as_transformers_says(
    name: str, converted: dict[str, Path], evaluation: Evaluation, tokens: np.ndarray, original: Any, tmp_path: Path
) -> None:
    found = next(target for target in evaluation.targets if target["name"] == name)
    floats = convert("dequantize", converted[name], tmp_path / "floats")
    wanted = figures(original, log_probabilities(load(floats), tokens), tokens)
    assert wanted["kl"] > 1e-4
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-8), key
    assert found["hidden_error"][0] == 0
    assert len(found["hidden_error"]) == 5
    assert min(found["hidden_error"][1:]) > 1e-3
    quantiles = found["kl_quantiles"]
    assert 0 <= quantiles["p50"] < quantiles["p95"] < quantiles["p99"] < quantiles["max"]


def test_the_source_is_scored_as_transformers_scores_it(evaluation: Evaluation, tokens: np.ndarray, original: Any) -> None:
    assert evaluation.source is not None
    assert evaluation.source["nll"] == pytest.approx(figures(original, original, tokens)["nll"], rel=1e-9)
    assert "kl" not in evaluation.source

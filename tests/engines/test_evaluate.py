"""`surgeon evaluate` predicts what vLLM predicts: with inputs quantized where it quantizes them, on the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tensorsurgeon.evaluating.options import TextOptions
from tensorsurgeon.evaluating.run import evaluate
from tests.checkpoints import FIXTURE
from tests.engines.conftest import Convert
from tests.engines.judging import HELDOUT, Engine, conversion

pytestmark = pytest.mark.engine

# Served by vLLM on every CPU that was tried; W8A8 quantizes inputs to INT8 while it runs.
MADE = (conversion("ct-w8a8-int8"), conversion("gptq-int4-g128"))
# Of the perplexity: kernels sum in other orders. Measured: 0.003 % for BF16 itself, 0.024 % for W8A8, 0.040 % for int4.
BOUND = 0.002


def test_perplexity_is_that_of_vllm(vllm: Engine, convert: Convert, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(FIXTURE)(HELDOUT.read_text())["input_ids"][: 24 * 250]
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(np.reshape(ids, (24, 250)).tolist()))
    checkpoints = [convert(FIXTURE, made) for made in MADE]
    rows = vllm.ask("vllm_score.py", "--json", "--tokens", tokens, FIXTURE, *checkpoints)
    found = evaluate(checkpoints, TextOptions(locations=(str(tokens),)), against=FIXTURE)
    assert found.source is not None
    for entry, checkpoint in zip((found.source, *found.targets), (FIXTURE, *checkpoints), strict=True):
        row = vllm.accepted(rows, checkpoint)
        apart = entry["perplexity"] / row["perplexity"] - 1
        print(f"{checkpoint.name}: vLLM {row['perplexity']:.4f}, evaluate {entry['perplexity']:.4f}, {apart:+.3%}")
        assert row["tokens"] == 24 * 249
        assert abs(apart) <= BOUND, f"{vllm.name}: {checkpoint.name} has {row['perplexity']:.4f}, evaluate {entry['perplexity']}"
    assert found.targets[0]["inputs"] == "int8 per token, dynamic"

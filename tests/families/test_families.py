"""A few families through everything; `make families` tries all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.trial import try_family

# Experts stacked with an MTP head, experts by w1/w2/w3, fused and plain dense linears, a state space, an FP8 source.
FEW = ("llama", "mixtral", "qwen3_5_moe", "nemotron_h")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FEW)
def test_a_family_is_right_throughout(name: str, tmp_path: Path) -> None:
    row = try_family(name, tmp_path / name)
    assert {stage: word for stage, word in row.stages.items() if word != "right"} == {}
    assert row.stages["mistakes show"] == "right"
    assert row.stages["gptq"] == "right"

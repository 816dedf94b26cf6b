"""A few families through everything; `make families` tries all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.page import page_of, word_of
from tests.families.trial import try_family

# Plain and fused linears; experts by w1/w2/w3; stacked ones with a tower and an MTP head; linears that no engine quantizes.
FEW = ("llama", "phi3", "mixtral", "qwen3_5_moe", "jamba")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FEW)
def test_a_family_is_right_throughout(name: str, tmp_path: Path) -> None:
    row = try_family(name, tmp_path / name)
    assert {stage: word for stage, word in row.stages.items() if word != "right"} == {}
    assert row.stages["mistakes show"] == "right"
    assert row.stages["gptq"] == "right"


# Experts in every form of stack, read back by the class; layouts that the judge once took for faults.
READ_BACK = ("gpt_oss", "llama4", "qwen3_vl_moe", "granitemoe", "dbrx", "gemma4", "mistral4")
JUDGED = ("mllama", "zamba2", "longcat_flash", "minicpm3", "deepseek_v4", "mistral3_fp8", "kimi_linear")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*READ_BACK, *JUDGED])
def test_a_family_is_right_without_calibration(name: str, tmp_path: Path) -> None:
    row = try_family(name, tmp_path / name, calibrate=False)
    assert {stage: word for stage, word in row.stages.items() if word != "right"} == {}
    assert {"w4a16 logits", "w8a8 logits", "mistakes show"} <= row.stages.keys()


def test_a_cell_says_the_first_thing_that_went_wrong() -> None:
    right = {"w4a16 plan": "right", "w4a16 apply": "right", "w4a16 scope": "right"}
    assert word_of(right, "w4a16") == "right"
    assert word_of({**right, "w4a16 scope": "takes model.layers.*.gate"}, "w4a16") == "**wrong: scope**"
    assert word_of({"w4a16 plan": "exit 33: layers.0.conv: cannot quantize"}, "w4a16") == "refused"
    assert word_of({"gptq": "exit 70: RuntimeError"}, "gptq") == "**traceback**"
    assert word_of({}, "gptq") == ""


def test_a_page_has_a_row_for_each_family_and_a_line_for_each_fault() -> None:
    rows = {
        "llama": {"stages": {"built": "right", "w8a8 plan": "right"}},
        "dbrx": {"stages": {"built": "right", "w8a8 plan": "exit 33: no"}},
    }
    page = page_of(rows)
    assert "| llama | LlamaForCausalLM |  | right |  | asked |" in page
    assert "- **dbrx**, w8a8 plan: exit 33: no" in page
    assert "W8A8: 1 right, 1 refused" in page

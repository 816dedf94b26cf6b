"""What the package says of an engine's classes is what was asked or read, all of it and nothing by hand."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

import pytest
import transformers

from tests.families.asked import as_text
from tests.families.read_transformers import stacks
from tests.families.table import FAMILIES

TEXT = resources.files("tensorsurgeon.models").joinpath("asked/vllm.json").read_text()
ASKED: dict[str, Any] = json.loads(TEXT)["architectures"]


def test_the_file_is_written_by_its_script() -> None:
    assert as_text(json.loads(TEXT)) == TEXT


def test_what_transformers_holds_in_stacks_is_what_its_files_say() -> None:
    """Written by its script, for the version that it names."""
    written = json.loads(resources.files("tensorsurgeon.models").joinpath("asked/transformers.json").read_text())
    if written["engine"] != f"transformers {transformers.__version__}":
        pytest.skip(f"was read from {written['engine']}")
    assert written["stacks"] == stacks()
    assert {"gemma4", "gpt_oss", "mistral4", "llama4"} <= written["stacks"].keys()
    assert not {"qwen3_moe", "qwen3_5_moe", "mixtral", "deepseek_v3"} & written["stacks"].keys()


def test_every_family_of_the_table_is_in_it() -> None:
    assert sorted(name for entry in ASKED.values() for name in entry["families"]) == sorted(
        name for name, family in FAMILIES.items() if family.asked
    )
    for name in (name for name, family in FAMILIES.items() if family.asked):
        family = FAMILIES[name]
        assert name in ASKED[family.architecture]["families"]
        assert family.config["model_type"] in ASKED[family.architecture]["model_types"]


def test_most_were_asked_and_the_others_say_where_it_was_read() -> None:
    assert sum(entry["how"] == "asked" for entry in ASKED.values()) >= 80
    for architecture, entry in ASKED.items():
        assert entry["how"] in ("asked", "read"), architecture
        if entry["how"] == "read":
            assert entry["reason"], architecture
            assert all(re.fullmatch(r"\S+\.py:\d+", source) for source in entry["source"]), architecture
            assert "takes" in entry or "gone" in entry, architecture


@pytest.mark.parametrize("architecture", [name for name, entry in ASKED.items() if "gone" not in entry])
def test_an_entry_names_modules(architecture: str) -> None:
    for entry in (ASKED[architecture], *([mtp] if (mtp := ASKED[architecture].get("mtp")) else [])):
        takes, never = entry.get("takes", {}), entry.get("never", {})
        assert takes or never
        assert not takes.keys() & never.keys()
        assert not any(re.search(r"(^|\.)\d+(\.|$)", name) for name in [*takes, *never])
        leaves = {name.split(".")[-1] for name in [*takes, *never]}
        for module, parts in entry.get("stacked", {}).items():
            assert module.split(".")[-1] in leaves
            assert parts


def test_what_is_known_to_decide_a_conversion_is_there() -> None:
    assert "model.layers.*.block_sparse_moe.gate" in ASKED["MixtralForCausalLM"]["never"]
    assert "model.layers.*.mlp.gate" in ASKED["Qwen3MoeForCausalLM"]["takes"]  # a router that must stand in the ignore list
    assert "model.layers.*.self_attn.indexer.wk_weights_proj" in ASKED["DeepseekV32ForCausalLM"]["never"]
    assert "model.layers.*.mamba.in_proj" in ASKED["JambaForCausalLM"]["never"]
    assert "model.layers.*.mixer.in_proj" in ASKED["NemotronHForCausalLM"]["takes"]
    assert ASKED["Lfm2MoeForCausalLM"]["names"]["substring"] == {".conv.": ".short_conv."}
    assert ASKED["Phi3ForCausalLM"]["fused"]["qkv_proj"] == ["qkv_proj"]
    assert "model.layers.*.eh_proj" in ASKED["DeepseekV3ForCausalLM"]["mtp"]["never"]

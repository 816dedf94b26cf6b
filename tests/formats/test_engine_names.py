"""Configs name modules as engines do where these have their own names, and read rules that are written in those names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.formats.ct_targets import Matcher
from tensorsurgeon.formats.gptq_dynamic import DynamicRules
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.recipes.library import load_transform
from tests.checkpoints import write_checkpoint

BF16 = np.zeros((64, 64), np.float16)


def planned(folder: Path, architecture: str, modules: tuple[str, ...], *steps: Any) -> Plan:
    tensors = {f"model.layers.{layer}.{module}.weight": BF16 for layer in (0, 1) for module in modules}
    config = {"architectures": [architecture], "num_hidden_layers": 2}
    write_checkpoint(folder, tensors | {"model.norm.weight": BF16[0]}, config=config)
    return make_plan(load_transform(*steps), open_checkpoint(folder))


# Architecture, what lies on disk, what vLLM 0.32 calls a linear of the attention and one of the rest, its own fused name.
OWN_NAMES = {
    "GptOssForCausalLM": (("self_attn.{}_proj", "mlp.up_proj"), "attn.q_proj", "mlp.up_proj", "attn.qkv_proj"),
    "JambaForCausalLM": (("self_attn.{}_proj", "feed_forward.up_proj"), "q_proj", "feed_forward.up_proj", "qkv_proj"),
    "LlamaForCausalLM": (("self_attn.{}_proj", "mlp.up_proj"), "self_attn.q_proj", "mlp.up_proj", "self_attn.qkv_proj"),
}


def on_disk(architecture: str) -> tuple[str, ...]:
    attention, other = OWN_NAMES[architecture][0]
    return (*(attention.format(part) for part in "qkv"), other, other.replace("up", "gate"))


@pytest.mark.parametrize("architecture", OWN_NAMES)
def test_targets_of_several_schemes_match_in_both_namings(architecture: str, tmp_path: Path) -> None:
    _, attention, other, _ = OWN_NAMES[architecture]
    plan = planned(
        tmp_path, architecture, on_disk(architecture), "mixed", {"attention": "w8a8", "mlp": "w4a16", "experts": "keep"}
    )
    groups = json.loads(plan.files.contents["config.json"])["quantization_config"]["config_groups"].values()
    by_bits = {group["weights"]["num_bits"]: group["targets"] for group in groups}

    def hits(targets: list[str], name: str) -> bool:
        return any(re.match(target.removeprefix("re:"), name) for target in targets)

    for name, bits in ((attention, 8), (other, 4), (on_disk(architecture)[0], 8), (on_disk(architecture)[3], 4)):
        assert hits(by_bits[bits], f"model.layers.1.{name}"), (architecture, name)
        assert not hits(by_bits[12 - bits], f"model.layers.1.{name}"), (architecture, name)
    assert all(
        Matcher(targets).matches(f"model.layers.0.{on_disk(architecture)[0]}") == (bits == 8) for bits, targets in by_bits.items()
    )


@pytest.mark.parametrize("architecture", OWN_NAMES)
def test_gptq_rules_keep_out_what_the_engine_calls_otherwise(architecture: str, tmp_path: Path) -> None:
    _, _, other, fused = OWN_NAMES[architecture]
    keep = {"format": "gptq", "group_size": "64", "where": ["role:mlp"]}
    plan = planned(tmp_path, architecture, on_disk(architecture), "quantize-linears", keep)
    dynamic = json.loads(plan.files.contents["config.json"])["quantization_config"]["dynamic"]

    def rule(name: str) -> str | None:
        return next((key for key in dynamic if re.match(key[2:], f"model.layers.1.{name}")), None)

    assert (rule(fused) or "").startswith("-:"), dynamic
    assert rule(other) is None
    assert rule(on_disk(architecture)[0]) is not None


BASE = Scheme(num_bits=4, type="int", symmetric=True, group_size=128)
RULED = {
    # What publishers write, in the names of the program that quantized: transformers', vLLM's, of the text model alone.
    "-:language_model\\.model\\.layers\\.0\\.mlp\\.down_proj": {},
    "-:.*self_attn\\.qkv_proj.*": {},
    "+:model\\.layers\\.1\\.mlp\\..*": {"bits": 8, "group_size": 64},
}


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
def test_rules_are_read_in_whatever_name_they_are_written(prefix: str) -> None:
    rules = DynamicRules(RULED, BASE)
    assert rules.scheme_for(f"{prefix}layers.0.mlp.down_proj") is None
    assert rules.scheme_for(f"{prefix}layers.0.mlp.up_proj") == BASE
    eight = rules.scheme_for(f"{prefix}layers.1.mlp.up_proj")
    assert eight is not None
    assert (eight.num_bits, eight.group_size) == (8, 64)
    # The first rule that matches decides.
    assert DynamicRules(dict(reversed(RULED.items())), BASE).scheme_for(f"{prefix}layers.1.mlp.down_proj") == eight

"""What engines run as one linear is what their classes said, and such linears are quantized alike, under one global scale."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import SpecError
from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.models.fused import FUSED, fused_name
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.ops.siblings import sibling_groups
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.running.run import run_plan
from tensorsurgeon.tensors.dtypes import BF16
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec
from tensorsurgeon.verifying.judging import verify
from tests.checkpoints import read_all, write_checkpoint
from tests.verifying.test_replayed import config_free

TEXT = resources.files("tensorsurgeon.models").joinpath("asked/vllm.json").read_text()
ASKED: dict[str, Any] = json.loads(TEXT)["architectures"]
DECLARED = [
    (architecture, fused, parts)
    for architecture, entry in ASKED.items()
    for kind in ("fused", "stacked")
    for fused, parts in entry.get(kind, {}).items()
    if len(parts) > 1 and "takes" in entry
]


def model(architecture: str, modules: list[str]) -> SpecMap:
    specs = (TensorSpec(f"{name}.weight", BF16, (32, 32)) for name in modules)
    return SpecMap(specs, {"architectures": [architecture], "model_type": "unheard_of"})


@pytest.mark.parametrize(("architecture", "fused", "parts"), DECLARED)
def test_every_fusion_that_a_class_declares_is_one_group(architecture: str, fused: str, parts: list[str]) -> None:
    at = "model.layers.0.self_attn"
    specs = model(architecture, [f"{at}.{part}" for part in parts])
    names = {describe_model(specs).fused_name(spec.module) for spec in specs.values()}
    assert names == {f"{at}.{fused}"}
    assert len(sibling_groups(specs, specs)) == 1


@pytest.mark.parametrize("fused", FUSED)
def test_a_model_that_nobody_was_asked_about_is_fused_as_most_are(fused: str) -> None:
    specs = model("UnheardOf", [f"model.layers.0.x.{part}" for part in FUSED[fused]])
    for spec in specs.values():
        assert describe_model(specs).fused_name(spec.module) == fused_name(spec.module) == f"model.layers.0.x.{fused}"
    assert describe_model(specs).fused_name("model.layers.0.x.o_proj") is None


def test_what_a_class_builds_apart_is_not_fused() -> None:
    specs = model("MiniCPM3ForCausalLM", ["model.layers.0.self_attn.q_a_proj", "model.layers.0.self_attn.kv_a_proj_with_mqa"])
    assert {describe_model(specs).fused_name(spec.module) for spec in specs.values()} == {None}


def test_a_part_of_two_fusions_goes_with_those_that_are_there() -> None:
    linear, latent = "model.layers.0.self_attn", "model.layers.1.self_attn"
    names = [f"{linear}.{part}_proj" for part in ("q", "k", "v", "b", "f_a")]
    specs = model("KimiLinearForCausalLM", [*names, f"{latent}.q_proj", f"{latent}.kv_a_proj_with_mqa"])
    described = describe_model(specs)
    assert {described.fused_name(name) for name in names} == {f"{linear}.in_proj_qkvgfab"}
    assert described.fused_name(f"{latent}.kv_a_proj_with_mqa") is None


def test_kimi_s_linear_attention_shares_one_global_scale(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    at = "model.layers.0.self_attn"
    parts = ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj")
    tensors = {
        f"{at}.{part}.weight": (rng.normal(size=(32, 64)) * 2.0**n).astype(ml_dtypes.bfloat16)
        for n, part in enumerate((*parts, "o_proj"))
    }
    config = {"architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear"}
    write_checkpoint(tmp_path / "source", tensors, config=config)
    step = Quantize(where=(f"{at}.{{part}}.weight",), format="ct-nvfp4")
    run_plan(make_plan(step, open_checkpoint(tmp_path / "source")), tmp_path / "out")
    scales = {name: array for name, array in read_all(tmp_path / "out").items() if name.endswith("weight_global_scale")}
    assert len({float(scales[f"{at}.{part}.weight_global_scale"].item()) for part in parts}) == 1
    assert scales[f"{at}.o_proj.weight_global_scale"] != scales[f"{at}.q_proj.weight_global_scale"]
    assert not config_free(verify(tmp_path / "out", tmp_path / "source"))
    some = Quantize(where=(f"{at}.{{part}}.weight",), exclude=(f"{at}.b_proj.weight",), format="ct-nvfp4")
    with pytest.raises(SpecError, match=r"b_proj is not, but engines fuse them into .*in_proj_qkvgfab"):
        make_plan(some, open_checkpoint(tmp_path / "source"))

"""Several formats in one checkpoint: written by steps of one recipe, told apart by the config, read back to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tensorsurgeon as ts
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import PlanError, RecipeError
from tensorsurgeon.formats.registry import formats_of, quantization_config
from tensorsurgeon.ops.dequantize import Dequantize
from tests.checkpoints import Tensors, apply, read_all, write_checkpoint
from tests.ops.arrays import BF16
from tests.ops.quantized import config_of

CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16", "num_hidden_layers": 2,
    "num_experts": 4, "hidden_size": 128, "moe_intermediate_size": 64, "vocab_size": 32,
}  # fmt: skip
EXPERTS = "{p*}.mlp.experts.{e*}.weight"
ATTENTION = "{p*}.self_attn.{n}.weight"
PAIRS = [
    ({"format": "ct-nvfp4"}, {"format": "ct-float"}),
    ({"format": "ct-packed", "group_size": 32}, {"format": "ct-int"}),
    ({"format": "ct-packed", "group_size": 64, "symmetric": False}, {"format": "ct-float"}),
    ({"format": "ct-mxfp4"}, {"format": "ct-int"}),
    ({"format": "ct-nvfp4"}, {"format": "ct-mxfp4"}),
    ({"format": "ct-packed", "group_size": 32}, {"format": "ct-float", "block": (128, 128)}),
]


def experts_and_attention() -> Tensors:
    rng = np.random.default_rng(2)

    def make(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.05, shape).astype(BF16)

    tensors: Tensors = {
        "model.embed_tokens.weight": make(32, 128),
        "lm_head.weight": make(32, 128),
        "model.norm.weight": make(128),
    }
    for n in range(2):
        at = f"model.layers.{n}"
        tensors |= {f"{at}.self_attn.{name}_proj.weight": make(128, 128) for name in "qkvo"}
        tensors[f"{at}.mlp.gate.weight"] = make(4, 128)
        for e in range(4):
            tensors |= {f"{at}.mlp.experts.{e}.{name}_proj.weight": make(64, 128) for name in ("gate", "up")}
            tensors[f"{at}.mlp.experts.{e}.down_proj.weight"] = make(128, 64)
    return tensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "s", experts_and_attention(), config=CONFIG)


def steps(experts, attention):
    return [ts.Quantize(where=(EXPERTS,), **experts), ts.Quantize(where=(ATTENTION,), **attention)]


@pytest.mark.parametrize(("experts", "attention"), PAIRS)
def test_two_formats_are_written_read_back_and_found_sound(experts, attention, source, tmp_path):
    ts.apply(ts.plan(steps(experts, attention), source), tmp_path / "q")
    opened = open_checkpoint(tmp_path / "q")
    settings = quantization_config(opened.config)
    assert settings["format"] == "mixed-precision"
    assert {group["format"] for group in settings["config_groups"].values()} == {
        word for layout in formats_of(opened.config, opened.specs) for word in layout.words
    }
    assert {layout.name for layout in formats_of(opened.config, opened.specs)} == {experts["format"], attention["format"]}
    apply(Dequantize(dtype="F32"), tmp_path / "q", tmp_path / "f")
    found = read_all(tmp_path / "f")
    for number, step in enumerate(steps(experts, attention)):
        # Each format by itself gives the same weights.
        apply(step, source, tmp_path / f"q{number}")
        apply(Dequantize(dtype="F32"), tmp_path / f"q{number}", tmp_path / f"f{number}")
        alone = read_all(tmp_path / f"f{number}")
        modules = [n for n in alone if (".experts." in n if number == 0 else ".self_attn." in n)]
        assert len(modules) == (24 if number == 0 else 8)
        assert all(found[name].tobytes() == alone[name].tobytes() for name in modules)
    assert "quantization_config" not in config_of(tmp_path / "f")


@pytest.mark.parametrize(("experts", "attention"), PAIRS)
def test_the_judge_finds_them_sound(experts, attention, source, tmp_path):
    ts.apply(ts.plan(steps(experts, attention), source), tmp_path / "q")
    found = ts.verify(tmp_path / "q", against=source)
    assert found.is_sound, [str(fault) for fault in found.faults]


@pytest.mark.parametrize(
    ("experts", "attention"), [("nvfp4", "fp8"), ("w4a16", "w8a8"), ("mxfp4", "fp8-block"), ("keep", "w8a16")]
)
def test_the_built_in_takes_a_scheme_for_each_role(experts, attention, source, tmp_path):
    plan = ts.plan(ts.transform("mixed", experts=experts, attention=attention, mlp="keep"), source)
    written = {module: way.format.name for module, way in plan.written.items()}
    names = {"nvfp4": "ct-nvfp4", "w4a16": "ct-packed", "mxfp4": "ct-mxfp4", "w8a16": "ct-packed", "w8a8": "ct-int"}
    assert {name for module, name in written.items() if ".self_attn." in module} == {names.get(attention, "ct-float")}
    assert len([module for module in written if ".experts." in module]) == (0 if experts == "keep" else 24)
    ts.apply(plan, tmp_path / "q")
    assert ts.verify(tmp_path / "q", against=source).is_sound


def test_a_mixed_checkpoint_goes_on_into_one_format(source, tmp_path):
    ts.apply(ts.plan(steps(*PAIRS[0]), source), tmp_path / "q")
    again = ts.Quantize(where=(EXPERTS, ATTENTION), format="ct-int")
    ts.apply(ts.plan(again, tmp_path / "q"), tmp_path / "direct")
    apply(Dequantize(dtype="F32"), tmp_path / "q", tmp_path / "f")
    # Scales are stored in the model's own dtype, whatever the weights were in on the way.
    apply(replace(again, scale_dtype="BF16"), tmp_path / "f", tmp_path / "two")
    one, two = read_all(tmp_path / "direct"), read_all(tmp_path / "two")
    quantized = [name for name in one if ".experts." in name or ".self_attn." in name]
    assert all(one[name].tobytes() == two[name].tobytes() for name in quantized)


def test_activations_are_told_for_each_format(source, tmp_path):
    plan = ts.plan(steps({"format": "ct-nvfp4"}, {"format": "ct-float", "activations": "none"}), source)
    ts.apply(plan, tmp_path / "q")
    groups = config_of(tmp_path / "q")["quantization_config"]["config_groups"].values()
    assert all(group["input_activations"] is None for group in groups)
    with pytest.raises(RecipeError, match="ct-int takes activations dynamic"):
        ts.plan(steps({"format": "ct-nvfp4"}, {"format": "ct-int", "activations": "none"}), source)


def test_what_no_one_config_describes_is_refused(source):
    with pytest.raises(PlanError, match=r"steps write ct-nvfp4 and quark-int8, .* only formats of compressed-tensors"):
        ts.plan(steps({"format": "ct-nvfp4"}, {"format": "quark-int8"}), source)
    with pytest.raises(PlanError, match="ct-int and pack-quantized write the same codes"):
        ts.plan(steps({"format": "ct-packed", "group_size": -1, "num_bits": 8}, {"format": "ct-int"}), source)

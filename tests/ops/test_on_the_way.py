"""A quantized source goes into another quantization in one command, rounded once: equal to going by way of F32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tensorsurgeon as ts
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.formats.registry import FORMATS
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.planning.report import plan_as_text
from tests.checkpoints import Tensors, apply, read_all, write_checkpoint
from tests.ops.arrays import BF16
from tests.ops.published import PUBLISHED, UP
from tests.ops.quantized import CONFIG, MLP, config_of, quantize, write_quantized
from tests.ops.test_published_sources import written


def floats_of(tensors: Tensors) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in tensors.items()}


def by_way_of_f32(step, source: Path, folder: Path) -> Path:
    """Dequantized to F32, quantized in a second run."""
    apply(Dequantize(dtype="F32"), source, folder / "f32")
    ts.apply(ts.plan(step, folder / "f32"), folder / "q")
    return folder / "q"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_layout_becomes_int4_as_if_by_way_of_f32(name, tmp_path):
    source = write_quantized(tmp_path / "s", name)
    step = quantize("ct-packed", group_size=32)
    plan = ts.plan(step, source)
    assert ": 3 modules, dequantized on the way" in plan_as_text(plan)
    ts.apply(plan, tmp_path / "direct")
    other = by_way_of_f32(step, source, tmp_path)
    assert floats_of(read_all(tmp_path / "direct")) == floats_of(read_all(other))
    assert config_of(tmp_path / "direct")["quantization_config"] == config_of(other)["quantization_config"]


@pytest.mark.parametrize("target", ["ct-int", "gptq", "ct-nvfp4", "hf-fp8", "quark-int8", "autoround"])
def test_fp8_blocks_become_every_kind(target, tmp_path):
    source = write_quantized(tmp_path / "s", "hf-fp8")
    ts.apply(ts.plan(quantize(target), source), tmp_path / "direct")
    assert floats_of(read_all(tmp_path / "direct")) == floats_of(read_all(by_way_of_f32(quantize(target), source, tmp_path)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_become_int8_as_if_by_way_of_f32(name, tmp_path):
    published = PUBLISHED[name]()
    source = written(tmp_path / "s", published)
    step = ts.Quantize(where=("{p*}.mlp.{n}.weight", "maybe:{p*}.ffn.{n*}.weight"), format="ct-int")
    if UP not in published.weights:
        step = ts.Quantize(where=("{p*}.ffn.{n*}.weight",), format="ct-int")
    ts.apply(ts.plan(step, source), tmp_path / "direct")
    found = read_all(tmp_path / "direct")
    other = read_all(by_way_of_f32(step, source, tmp_path))
    for module, weight in published.weights.items():
        if f"{module}.weight_scale" in found:
            assert found[f"{module}.weight"].tobytes() == other[f"{module}.weight"].tobytes()
            continue
        # What stays a float is rounded once, to what the model computes in.
        assert found[f"{module}.weight"].tobytes() == weight.astype(BF16).tobytes()


@pytest.mark.parametrize("name", ["hf-fp8", "ct-float", "ct-packed", "ct-nvfp4", "ct-mxfp4", "quark-int8", "gptq"])
def test_large_weights_go_piece_by_piece_and_give_the_same_bytes(name, tmp_path, monkeypatch):
    source = write_quantized(tmp_path / "s", name, tensors_of(992), **({"symmetric": False} if name == "ct-packed" else {}))
    apply(Dequantize(), source, tmp_path / "whole-bf16")
    ts.apply(ts.plan(quantize("ct-int"), source), tmp_path / "whole")
    monkeypatch.setattr("tensorsurgeon.ops.row_blocks.CHUNK_BYTES", 128 * 256 * 4)
    plan = ts.plan(quantize("ct-int"), source)
    ts.apply(plan, tmp_path / "pieces", workers=2)
    assert floats_of(read_all(tmp_path / "pieces")) == floats_of(read_all(tmp_path / "whole"))
    apply(Dequantize(), source, tmp_path / "pieces-bf16")
    assert floats_of(read_all(tmp_path / "pieces-bf16")) == floats_of(read_all(tmp_path / "whole-bf16"))
    # Words that lie across the rows, and zero points that share words, are unpacked whole.
    assert len([unit for unit in plan.units if unit.tasks]) > 3 or name in ("gptq", "ct-packed")


@pytest.mark.parametrize(("name", "target"), [("hf-fp8", "ct-int"), ("ct-nvfp4", "quark-int8"), ("ct-float", "ct-int")])
def test_a_unit_holds_about_as_much_as_for_a_float_source(name, target, tmp_path):
    weight = {f"{MLP}.up_proj.weight": np.full((4096, 3072), 0.5, BF16)}
    source = write_checkpoint(tmp_path / "s", weight, config=CONFIG)
    ts.apply(ts.plan(quantize(name), source), tmp_path / "q")
    assert ts.plan(quantize(target), tmp_path / "q").peak_unit_bytes < 2 * ts.plan(quantize(target), source).peak_unit_bytes


def tensors_of(rows: int) -> Tensors:
    rng = np.random.default_rng(3)
    return {f"{MLP}.{n}_proj.weight": rng.normal(0, 0.05, (rows, 256)).astype(BF16) for n in ("gate", "up")} | {
        f"{MLP}.down_proj.weight": rng.normal(0, 0.05, (256, 1024)).astype(BF16)
    }


def test_built_ins_take_a_quantized_source_and_the_record_says_how(tmp_path):
    rng = np.random.default_rng(5)
    tensors: Tensors = {"model.embed_tokens.weight": np.ones((8, 128), BF16), "model.norm.weight": np.ones(128, BF16)}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"):
        tensors[f"model.layers.0.{name}.weight"] = rng.normal(0, 0.05, (128, 128)).astype(BF16)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "num_hidden_layers": 1}
    source = write_checkpoint(tmp_path / "s", tensors, config=config)
    ts.apply(ts.plan(ts.transform("fp8-block"), source), tmp_path / "fp8")
    plan = ts.plan(ts.transform("ct-w4a16-g32"), tmp_path / "fp8")
    ts.apply(plan, tmp_path / "int4")
    found = open_checkpoint(tmp_path / "int4")
    assert "model.layers.0.mlp.up_proj.weight_packed" in found.specs
    recipe = json.loads((tmp_path / "int4" / "surgeon.json").read_text())["recipe"]
    assert recipe[0].startswith("Dequantize(dtype='F32'")
    assert recipe[-1].startswith("Round(")


def test_a_step_that_dequantizes_by_itself_is_left_as_it_is(tmp_path):
    source = write_quantized(tmp_path / "s", "hf-fp8")
    plan = ts.plan([Dequantize(), quantize("ct-int")], source)
    assert [type(step).__name__ for step in plan.steps] == ["Dequantize", "Quantize"]


def test_the_scales_of_the_inputs_are_said_to_go(tmp_path):
    source = written(tmp_path / "s", PUBLISHED["fp8 per tensor, static"]())
    text = plan_as_text(ts.plan(quantize("ct-int"), source))
    wanted = "read as hf-fp8 (fp8 8 bits, one scale); activation_scale of their inputs dropped: 1 modules, dequantized on the way"
    assert wanted in text

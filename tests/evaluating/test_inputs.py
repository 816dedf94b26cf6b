"""Inputs that the config quantizes: which, and that they change predictions as they do in a model that quantizes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import ConfigError
from tensorsurgeon.evaluating.options import TextOptions
from tensorsurgeon.evaluating.run import evaluate
from tensorsurgeon.formats.inputs import input_rules
from tensorsurgeon.quant.inputs import InputScheme, quantized_inputs
from tensorsurgeon.quant.rtn.fp4 import mxfp4, values_of
from tensorsurgeon.quant.scheme import Scheme
from tests.calibrate.models import save_random
from tests.evaluating.judging import convert, figures, load, log_probabilities

# Written anew, from what the engines' kernels do: vLLM csrc/quantization/w8a8/int8 and fp8, DeepGEMM's groups.
TOKEN = {"int8": lambda x: _int8(x, -1), "fp8": lambda x: _fp8(x, x.abs().amax(-1, keepdim=True) / 448)}


def _int8(x: Tensor, axis: int) -> Tensor:
    scale = x.abs().amax(axis, keepdim=True) / 127
    return (x / scale).round().clamp(-128, 127) * scale


def _fp8(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def _blocks(x: Tensor) -> Tensor:
    parts = x.split(128, -1)
    return torch.cat([_fp8(part, part.abs().amax(-1, keepdim=True) / 448) for part in parts], -1)


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(np.random.default_rng(5).integers(0, 96, (6, 40)).tolist()))
    return path


CASES: list[tuple[str, dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ("ct-int", {}, TOKEN["int8"]),
    ("quark-int8", {}, TOKEN["int8"]),
    ("ct-float", {}, TOKEN["fp8"]),
    ("quark-fp8", {}, TOKEN["fp8"]),
    ("hf-fp8", {}, _blocks),
]


@pytest.mark.parametrize(("layout", "settings", "quantize"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_predictions_are_those_of_a_model_that_quantizes_its_inputs(
    kind: str, layout: str, settings: dict[str, Any], quantize: Callable[[Tensor], Tensor], ids: Path, tmp_path: Path
) -> None:
    source = save_random(tmp_path / "source", kind)
    target = convert("quantize-linears", source, tmp_path / "target", format=layout, **settings)
    floats = convert("dequantize", target, tmp_path / "floats")
    tokens = np.array(json.loads(ids.read_text()))
    model = load(floats)
    modules = {name.rpartition(".")[0] for name in open_checkpoint(target).specs if "scale" in name}
    whole = nn.functional.linear
    quantized = {id(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n in modules}
    stacks = [p for n, p in model.named_parameters() if p.ndim == 3 and "experts" in n]

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        is_expert = any(s.data_ptr() <= weight.data_ptr() < s.data_ptr() + s.nbytes for s in stacks)
        if id(weight) not in quantized and not is_expert:
            return whole(x, weight, bias)
        assert bias is None
        return whole(quantize(x.float()), weight.float()).to(x.dtype)

    nn.functional.linear = linear  # type: ignore[assignment]
    try:
        predicted = log_probabilities(model, tokens)
    finally:
        nn.functional.linear = whole  # type: ignore[assignment]
    original = log_probabilities(load(source), tokens)
    text = TextOptions(locations=(str(ids),))
    found = evaluate([target], text, against=source, workers=1).targets[0]
    alone = evaluate([target], text, against=source, workers=1, float_inputs=True).targets[0]
    wanted = figures(original, predicted, tokens)
    assert found["kl"] == pytest.approx(wanted["kl"], rel=0.01, abs=1e-5)
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-4)
    # More or less: in a model of random weights one router's other choice outweighs all rounding.
    assert abs(found["kl"] - alone["kl"]) > 0.01 * alone["kl"]
    assert "dynamic" in found["inputs"]
    assert alone["inputs"] == "as they are"


def with_config(folder: Path, change: Callable[[dict[str, Any]], None], tensors: dict[str, Tensor] | None = None) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_static_scale_is_read_from_the_file(ids: Path, tmp_path: Path) -> None:
    source = save_random(tmp_path / "source", "llama")
    target = convert("quantize-linears", source, tmp_path / "target", format="ct-float")
    modules = [n.removesuffix(".weight_scale") for n in open_checkpoint(target).specs if n.endswith(".weight_scale")]

    def change(config: dict[str, Any]) -> None:
        for group in config["config_groups"].values():
            group["input_activations"] |= {"dynamic": False, "strategy": "tensor"}

    with_config(target, change, {f"{module}.input_scale": torch.tensor([0.02]) for module in modules})
    rules = input_rules(open_checkpoint(target).specs, modules)
    assert {rule.scale for rule in rules.values()} == {f"{module}.input_scale" for module in modules}
    text = TextOptions(locations=(str(ids),))
    right = evaluate([target], text, against=source, workers=1).targets[0]
    with_config(target, lambda config: None, {f"{module}.input_scale": torch.tensor([1e-4]) for module in modules})
    clipped = evaluate([target], text, against=source, workers=1).targets[0]
    assert right["inputs"] == "fp8 per tensor, static"
    assert clipped["kl"] > 5 * right["kl"]


def test_a_static_scale_that_is_not_there_is_told(tmp_path: Path) -> None:
    source = save_random(tmp_path / "source", "llama")
    target = convert("quantize-linears", source, tmp_path / "target", format="ct-float")

    def change(config: dict[str, Any]) -> None:
        for group in config["config_groups"].values():
            group["input_activations"] |= {"dynamic": False, "strategy": "tensor"}

    checkpoint = open_checkpoint(with_config(target, change))
    with pytest.raises(ConfigError, match=r"q_proj: its inputs have a static scale by the config, and the checkpoint has none"):
        input_rules(checkpoint.specs, ["model.layers.0.self_attn.q_proj"])


def test_weight_only_layouts_leave_inputs_alone(tmp_path: Path) -> None:
    source = save_random(tmp_path / "source", "llama")
    target = convert("quantize-linears", source, tmp_path / "target", format="ct-packed", num_bits=4, group_size=16)
    specs = open_checkpoint(target).specs
    assert not input_rules(specs, ["model.layers.0.self_attn.q_proj"])


NVFP4 = InputScheme(type="nvfp4", num_bits=4, per="group", group_size=16, is_static=True)
SCHEMES = [
    (InputScheme(type="int"), None, 1 / 127),
    (InputScheme(type="int", symmetric=False), None, 1 / 127),
    (InputScheme(type="int", num_bits=4, per="group", group_size=32), None, 1 / 7),
    (InputScheme(type="fp8", per="tensor"), None, 1 / 16),
    (InputScheme(type="fp8", per="group", group_size=128), None, 1 / 16),
    (NVFP4, 448 * 6 / 5.0, 1 / 4),
    (InputScheme(type="mxfp4", num_bits=4, per="group", group_size=32), None, 1 / 2),
]


def test_mxfp4_inputs_have_the_scales_that_weights_have() -> None:
    """Half-way between 6 and 8 a group goes to the next power of two: its largest value is 8 of the lower one, not 6."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    x[0, :32] = torch.linspace(-1.9, 1.9, 32)
    scheme = InputScheme(type="mxfp4", num_bits=4, per="group", group_size=32)
    weights = mxfp4(x, Scheme(type="mxfp4", num_bits=4, group_size=32))
    values = values_of(torch.from_numpy(weights.codes)).view(64, 3, 32) * torch.from_numpy(weights.scale)[..., None]
    assert torch.equal(quantized_inputs(x, scheme), values.view(64, 96))
    assert quantized_inputs(x, scheme)[0].max() == 2.0


@pytest.mark.parametrize(("scheme", "scale", "relative"), SCHEMES, ids=[str(s[0]) for s in SCHEMES])
def test_values_stay_near_and_are_few(scheme: InputScheme, scale: float | None, relative: float) -> None:
    x = torch.randn(7, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[3] = 0
    made = quantized_inputs(x, scheme, scale)
    assert made.dtype == torch.float32
    assert torch.equal(made[3], torch.zeros(200))
    assert float((made - x.float()).abs().max()) < relative * float(x.abs().max())
    assert not torch.equal(made, x.float())
    # What codes stand for, quantized again, is itself (an exponent or a zero point may move where the largest moved).
    if scheme.symmetric and scheme.type in ("int", "fp8"):
        assert torch.allclose(quantized_inputs(made, scheme, scale), made, rtol=1e-5)

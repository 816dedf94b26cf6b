"""Logits of compressed-tensors checkpoints whose inputs are quantized by that library's functions, in F32.

Runs inside the environment that transformers_env.sh makes:

    DIR/bin/python tests/engines/ct_inputs.py OUT CHECKPOINT... --tokens TOKENS.json

writes OUT/NAME.npy (F32 [sequences, positions, vocabulary], NAME the checkpoint's folder) and prints one JSON line per
checkpoint: {"path", "products": how many linears had their inputs quantized} or {"path", "error"}. A checkpoint without a
quantization_config is run as it is; of another, weights are those of the folder NAME-floats beside it, which
test_transformers.py compares with the library's own. transformers puts experts into stacks that the library does not reach,
so its functions are called here wherever a product is with a weight that the checkpoint has codes of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors import safe_open
from transformers_logits import model_class, run

LINEAR = torch.nn.functional.linear


def load(folder: Path) -> Any:
    model = model_class(folder).from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    return model.eval()


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if "weight_packed" in name or ".input_" in name}  # noqa: SIM118
            found |= {name: torch.empty(0) for name in file.keys() if name.endswith(".weight_scale")}  # noqa: SIM118
    return found


class Quantizing:
    """Stands in for F.linear: inputs of the products with quantized weights go through the library's functions first."""

    def __init__(self, checkpoint: Path, model: Any) -> None:
        config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
        (scheme,) = QuantizationConfig(**config).config_groups.values()
        self.args = scheme.input_activations
        self.tensors = read_all(checkpoint)
        self.modules = {name.rpartition(".")[0] for name in self.tensors}
        self.products: set[str] = set()
        # First byte, one past the last, and the module whose scales are those of all of it.
        self.places: list[tuple[int, int, str]] = []
        for name, parameter in model.named_parameters():
            module = name.removesuffix(".weight")
            if parameter.ndim == 3 and ".experts." in name:
                before, _, kind = name.rpartition(".")
                module = f"{before}.0.{'down_proj' if kind == 'down_proj' else 'gate_proj'}"
            if module in self.modules:
                self.places.append((parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes, module))

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        module = next((m for start, stop, m in self.places if start <= weight.data_ptr() < stop), None)
        if module is None or not x.numel():
            return LINEAR(x, weight, bias)
        self.products.add(module)
        over_all = self.tensors.get(f"{module}.input_global_scale")
        if self.args.dynamic:
            scale, zero_point = compute_dynamic_scales_and_zp(x, self.args, None, global_scale=over_all)
        else:
            scale, zero_point = self.tensors[f"{module}.input_scale"], None
        return LINEAR(fake_quantize(x, scale, zero_point, self.args, global_scale=over_all), weight, bias)


def logits(checkpoint: Path, tokens: torch.Tensor) -> tuple[np.ndarray, int]:
    config = json.loads((checkpoint / "config.json").read_text())
    if "quantization_config" not in config:
        with torch.inference_mode():
            return load(checkpoint)(input_ids=tokens).logits.numpy(), 0
    model = load(checkpoint.with_name(f"{checkpoint.name}-floats"))
    quantizing = Quantizing(checkpoint, model)
    torch.nn.functional.linear = quantizing
    try:
        with torch.inference_mode():
            return model(input_ids=tokens).logits.numpy(), len(quantizing.products)
    finally:
        torch.nn.functional.linear = LINEAR


if __name__ == "__main__":
    sys.exit(run("Logits with compressed-tensors' weights and inputs.", "products", logits))

"""`surgeon evaluate` with inputs in NVFP4, MXFP4 and static FP8 predicts what compressed-tensors' own functions predict.

No CPU has kernels for these; the library's reader is what says how they are computed. In F32 on both sides, so that
nothing but the quantization can differ; the fixture has linears of its own and experts in stacks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.evaluating.options import TextOptions
from tensorsurgeon.evaluating.run import evaluate
from tests.checkpoints import FIXTURE
from tests.engines.judging import HELDOUT, Engine
from tests.evaluating.judging import convert, figures

pytestmark = pytest.mark.engine

# What llm-compressor writes of inputs (compressed_tensors.quantization.quant_scheme), and the tensor of a static scale.
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
CASES: dict[str, tuple[str, dict[str, Any], str | None, float]] = {
    "nvfp4": (
        "ct-nvfp4",
        {**FP4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"},
        "input_global_scale",
        448 * 6 / 12.0,
    ),
    "mxfp4": (
        "ct-mxfp4",
        {**FP4, "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"},
        None,
        0.0,
    ),
    "fp8": (
        "ct-float",
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
        "input_scale",
        12.0 / 448,
    ),
}


def with_inputs(folder: Path, args: dict[str, Any], scale: str | None, value: float) -> Path:
    """The checkpoint with quantized inputs, each layer's static scale another."""
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = args
    (folder / "config.json").write_text(json.dumps(config))
    if scale is not None:
        modules = {n.rpartition(".")[0] for n in open_checkpoint(folder).specs if n.endswith("weight_scale")}
        layers = {module: int(module.split(".layers.")[1].split(".")[0]) for module in modules}
        made = {f"{module}.{scale}": torch.tensor([value * (1 + layer / 8)]) for module, layer in layers.items()}
        path = folder / "model.safetensors"
        save_file(load_file(path) | made, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture, of which transformers makes an F32 model."""
    folder = Path(shutil.copytree(FIXTURE, tmp_path_factory.mktemp("f32") / "source"))
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = config["text_config"]["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_predictions_are_those_of_the_library_s_functions(transformers: Engine, source: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ids = np.reshape(AutoTokenizer.from_pretrained(FIXTURE)(HELDOUT.read_text())["input_ids"][: 6 * 200], (6, 200))
    (tmp_path / "tokens.json").write_text(json.dumps(ids.tolist()))
    targets = {}
    for name, (layout, args, scale, value) in CASES.items():
        made = convert("quantize-linears", source, tmp_path / name, format=layout)
        convert("dequantize", made, tmp_path / f"{name}-floats", dtype="F32")
        targets[name] = with_inputs(made, args, scale, value)
    rows = transformers.ask("ct_inputs.py", tmp_path / "logits", source, *targets.values(), "--tokens", tmp_path / "tokens.json")
    transformers.accepted(rows, source)
    text = TextOptions(locations=(str(tmp_path / "tokens.json"),))
    found = evaluate(list(targets.values()), text, against=source)
    alone = evaluate(list(targets.values()), text, against=source, float_inputs=True)
    original = torch.from_numpy(np.load(tmp_path / "logits" / "source.npy")).double().log_softmax(-1)
    for entry, floats, (name, target) in zip(found.targets, alone.targets, targets.items(), strict=True):
        # 4 layers' two stacks, shared experts' three linears, three layers' five of linear attention, q, k, v and o of one.
        assert transformers.accepted(rows, target)["products"] == 4 * 2 + 4 * 3 + 3 * 5 + 4
        predicted = torch.from_numpy(np.load(tmp_path / "logits" / f"{name}.npy")).double().log_softmax(-1)
        wanted = figures(original, predicted, ids)
        print(f"{name}: {entry['inputs']}: KL {entry['kl']:.6f}, theirs {wanted['kl']:.6f}, weights alone {floats['kl']:.6f}")
        assert entry["kl"] == pytest.approx(wanted["kl"], rel=0.01, abs=1e-5)
        assert entry["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-4)
        assert abs(entry["kl"] - floats["kl"]) > 0.05 * floats["kl"]

"""Logits of GPTQ and AWQ checkpoints as GPTQModel's own kernels for the CPU compute them.

Runs inside the environment that gptqmodel_env.sh makes:

    DIR/bin/python tests/engines/gptqmodel_logits.py OUT CHECKPOINT... --tokens TOKENS.json

writes OUT/NAME.npy (F32 [sequences, positions, vocabulary], NAME the checkpoint's folder), OUT/NAME.safetensors (the weights
[out, in] that GPTQModel dequantizes for its own products, where its module has a method for that) and prints one JSON line
per checkpoint: {"path", "modules": {class: count}} or {"path", "error"}. All in F16, which its kernels take and which
holds the scales of these formats as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.models.auto import MODEL_MAP
from safetensors.torch import save_file


def load(checkpoint: Path) -> Any:
    """Through GPTQModel where the config says that it is quantized, with its plain torch kernels; else as transformers does."""
    config = json.loads((checkpoint / "config.json").read_text())
    if "quantization_config" in config:
        return GPTQModel.load(str(checkpoint), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    return getattr(transformers, config["architectures"][0]).from_pretrained(checkpoint, dtype=torch.float16)


def main() -> int:
    parser = argparse.ArgumentParser(description="Logits of checkpoints as GPTQModel loads them.")
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help="JSON: token ids, [[...], ...] of equal length")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for definition in MODEL_MAP.values():
        definition.require_load_processor = False  # of images: no picture is shown, and torchvision is not here
    tokens = torch.tensor(json.loads(args.tokens.read_text()))
    refused = 0
    for checkpoint in args.checkpoints:
        row: dict[str, Any] = {"path": str(checkpoint)}
        try:
            model = load(checkpoint).eval()
            with torch.inference_mode():
                values = model(input_ids=tokens).logits.float().numpy()
            np.save(args.out / f"{checkpoint.resolve().name}.npy", values)
            weights = {
                f"{name}.weight": module.dequantize_weight().T.contiguous()
                for name, module in model.named_modules()
                if hasattr(module, "dequantize_weight")
            }
            save_file(weights, args.out / f"{checkpoint.resolve().name}.safetensors")
            kinds = (type(module).__name__ for module in model.modules())
            row["modules"] = dict(Counter(kind for kind in kinds if "inear" in kind))
        except Exception as error:  # noqa: BLE001  (whatever the engine says is the finding)
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"
            refused += 1
        print(json.dumps(row), flush=True)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())

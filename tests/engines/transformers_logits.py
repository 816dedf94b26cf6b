"""Logits of checkpoints as transformers loads them, each with the library of its own format.

Runs inside the environment that transformers_env.sh makes:

    DIR/bin/python tests/engines/transformers_logits.py OUT CHECKPOINT... --tokens TOKENS.json

writes OUT/NAME.npy (F32 [sequences, positions, vocabulary], NAME the checkpoint's folder) and prints one JSON line per
checkpoint: {"path", "modules": {class: count}} or {"path", "error"}. A tensor that the loader misses, does not expect or cannot
place is an error here: transformers only warns, and serves random weights in its place.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

# No class of the language model reads the MTP head; transformers ignores it by name.
IGNORED = ("mtp.",)


def model_class(checkpoint: Path) -> Any:
    config = json.loads((checkpoint / "config.json").read_text())
    return getattr(transformers, config["architectures"][0])


def logits(checkpoint: Path, tokens: torch.Tensor) -> tuple[np.ndarray, dict[str, int]]:
    """The F32 logits of a checkpoint loaded in BF16, and how many modules of each linear class it was loaded into."""
    model, found = model_class(checkpoint).from_pretrained(checkpoint, dtype=torch.bfloat16, output_loading_info=True)
    wrong = {
        kind: sorted(str(name) for name in names if not str(name).startswith(IGNORED))[:5]
        for kind, names in found.items()
        if any(not str(name).startswith(IGNORED) for name in names)
    }
    if wrong:
        raise ValueError(f"the loader reports {wrong}")
    model.eval()
    # Beside FP8 weights transformers keeps the F32 norms of this model as they are, without it rounds them to BF16.
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data = parameter.data.to(torch.bfloat16)
    with torch.inference_mode():
        values = model(input_ids=tokens).logits.float().numpy()
    kinds = Counter(type(module).__name__ for module in model.modules() if "inear" in type(module).__name__)
    return values, dict(kinds)


def run(description: str, what: str, logits: Callable[[Path, torch.Tensor], tuple[np.ndarray, Any]]) -> int:
    """The command: logits of each checkpoint into OUT, and a line for each, with ``what`` else ``logits`` says of it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help="JSON: token ids, [[...], ...] of equal length")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokens = torch.tensor(json.loads(args.tokens.read_text()))
    refused = 0
    for checkpoint in args.checkpoints:
        row: dict[str, Any] = {"path": str(checkpoint)}
        try:
            values, row[what] = logits(checkpoint, tokens)
            np.save(args.out / f"{checkpoint.resolve().name}.npy", values)
        except Exception as error:  # noqa: BLE001  (whatever the engine says is the finding)
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"
            refused += 1
        print(json.dumps(row), flush=True)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(run("Logits of checkpoints as transformers loads them.", "modules", logits))

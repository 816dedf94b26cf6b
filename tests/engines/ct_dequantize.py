"""Turn compressed-tensors checkpoints into BF16 ones with that library's own converter.

Runs inside the environment that transformers_env.sh makes:

    DIR/bin/python tests/engines/ct_dequantize.py OUT CHECKPOINT...

writes the checkpoint OUT/NAME (NAME the folder's) and prints one JSON line per checkpoint: {"path"} or {"path", "error"}.
The library reads config.json itself: what is quantized, and how, is its own view of the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path

from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer, convert_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description="Dequantize with compressed-tensors.")
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    args = parser.parse_args()
    refused = 0
    for checkpoint in args.checkpoints:
        row = {"path": str(checkpoint)}
        try:
            target = args.out / checkpoint.resolve().name
            convert_checkpoint(checkpoint, target, CompressedTensorsDequantizer(checkpoint), device="cpu")
        except Exception as error:  # noqa: BLE001  (whatever the library says is the finding)
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"
            refused += 1
        print(json.dumps(row), flush=True)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())

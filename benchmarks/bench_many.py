"""Peak memory and time of looking at a checkpoint of very many small tensors: inspect, verify, plan.

    python benchmarks/bench_many.py [--tensors 500000]

The source is a model of numbered experts whose weights are holes in sparse files: headers are what counts. Each command is a
process of its own, and its peak is what the kernel says of it (``VmHWM``). ``plan`` quantizes, so that its output has two
tensors for each weight. What ``apply`` made of it by renaming the routers is verified too: with its record, and against the
source, whose recipe is replayed then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

COMMANDS: Final = (("inspect",), ("verify",), ("plan", "fuse-experts"), ("plan", "ct-w8a8-int8"))
_RECIPE: Final = "description: Routers renamed.\nsteps: [{rename: {where: '{path*}.gate.weight', to: '{path}.router.weight'}}]\n"
_ROOT: Final = Path(__file__).parents[1]
_LAYERS, _WIDTH, _PARTS = 50, 16, ("gate_proj", "up_proj", "down_proj")


class Seen(NamedTuple):
    """What one command took."""

    peak: int
    seconds: float
    said: str


def write_many(folder: Path, tensors: int) -> int:
    """A model of about so many weights of 512 bytes, in one shard per layer; how many tensors it has."""
    folder.mkdir(parents=True)
    experts = max(1, tensors // (_LAYERS * len(_PARTS)))
    weight_map = {}
    total = 0
    for layer in range(_LAYERS):
        at = f"model.layers.{layer}.mlp"
        shapes = {f"{at}.experts.{e}.{part}.weight": (_WIDTH, _WIDTH) for e in range(experts) for part in _PARTS}
        shapes[f"{at}.gate.weight"] = experts, _WIDTH
        file = f"model-{layer + 1:05d}-of-{_LAYERS:05d}.safetensors"
        header: dict[str, Any] = {}
        position = 0
        for name, shape in shapes.items():
            end = position + 2 * shape[0] * shape[1]
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
            weight_map[name] = file
            position = end
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + position)
        total += position
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": _LAYERS, "hidden_size": _WIDTH,
        "moe_intermediate_size": _WIDTH, "num_experts": experts, "num_experts_per_tok": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return len(weight_map)


def seen(*words: str) -> Seen:
    """One command, in a process of its own."""
    code = (
        "import re, sys\n"
        "from tensorsurgeon.cli import main\n"
        f"try: main({[*words]!r}, standalone_mode=False)\n"
        "finally: print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1], file=sys.stderr)\n"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(_ROOT)}, capture_output=True, text=True, check=False
    )
    *messages, peak = done.stderr.strip().splitlines()
    return Seen(int(peak) * 1024, time.perf_counter() - began, done.stdout + "\n".join(messages))


def main() -> int:
    """Print a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=500_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-many-") as folder:
        count = write_many(Path(folder) / "source", given.tensors)
        print(f"{count} tensors; peak in MB, seconds")
        source, target, recipe = (str(Path(folder) / name) for name in ("source", "target", "recipe.yaml"))
        Path(recipe).write_text(_RECIPE)
        commands = {" ".join(words): (*words, source) for words in COMMANDS}
        commands["apply, renaming"] = ("apply", recipe, source, target, "--max-shard-size", "8MB")
        commands["verify with record"] = ("verify", target)
        commands["verify --against"] = ("verify", target, "--against", source)
        for label, words in commands.items():
            found = seen(*words)
            print(f"{label:24}{found.peak / 1e6:8.0f}{found.seconds:8.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

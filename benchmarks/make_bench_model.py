"""A checkpoint with the real model's per-tensor shapes and random weights, a few GB: what speed is measured on.

    python benchmarks/make_bench_model.py TARGET [--layers 4] [--experts 64] [--shards 6]

Hidden 2048, experts of 512, three linear-attention layers to one of full attention, MTP head, fused experts. The
values come from one block of normal numbers read at changing offsets: no kernel can tell, and it takes seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np

from tensorsurgeon.checkpoint.layout import INDEX_NAME, lay_out
from tensorsurgeon.tensors.dtypes import dtype_named
from tensorsurgeon.tensors.names import natural_key
from tensorsurgeon.tensors.spec import TensorSpec

_SKELETON = Path(__file__).parents[1] / "fixtures" / "qwen3.6-35b-a3b"
_VOCABULARY = 50_000


def bench_specs(layers: int, experts: int) -> list[TensorSpec]:
    """The skeleton's tensors with fewer layers, experts and words, and without the vision tower."""
    tensors = json.loads((_SKELETON / "qwen3.6-35b-a3b.tensors.json").read_text())["tensors"]
    specs = []
    for name, (dtype, shape) in tensors.items():
        parts = name.split(".")
        if "visual" in parts or (parts[0] == "model" and "layers" in parts and int(parts[parts.index("layers") + 1]) >= layers):
            continue
        if "experts" in parts or name.endswith("mlp.gate.weight"):
            shape = [experts, *shape[1:]]
        if shape[0] == 248320:
            shape = [_VOCABULARY, *shape[1:]]
        specs.append(TensorSpec(name, dtype_named(dtype), tuple(shape)))
    return sorted(specs, key=lambda spec: natural_key(spec.name))


def bench_config(layers: int, experts: int) -> dict[str, object]:
    config = json.loads((_SKELETON / "qwen3.6-35b-a3b.config.json").read_text())
    text = config["text_config"]
    text.update(num_hidden_layers=layers, layer_types=text["layer_types"][:layers], num_experts=experts, vocab_size=_VOCABULARY)
    return dict(config)


def write_bench_model(target: Path, *, layers: int = 4, experts: int = 64, shards: int = 6) -> int:
    """Write the checkpoint; returns its bytes."""
    specs = bench_specs(layers, experts)
    total = sum(spec.nbytes for spec in specs)
    layout = lay_out(specs, {"format": "pt"}, total if shards == 1 else total // shards + 50_000_000)
    block = np.random.default_rng(0).normal(0, 0.02, 8 << 20).astype(ml_dtypes.bfloat16).view(np.uint16)
    block = np.concatenate([block, block])
    target.mkdir(parents=True)
    start = 0
    for shard in layout.shards:
        with open(target / shard.name, "wb") as file:
            file.write(shard.header)
            for spec in shard.specs:
                if spec.dtype.name != "BF16":
                    np.ones(spec.numel, spec.dtype.numpy).tofile(file)
                    continue
                left = spec.numel
                while left:
                    count = min(left, 8 << 20)
                    block[start : start + count].tofile(file)
                    start = (start + 1_000_003) % (8 << 20)
                    left -= count
    if layout.index_json is not None:
        (target / INDEX_NAME).write_bytes(layout.index_json)
    (target / "config.json").write_text(json.dumps(bench_config(layers, experts), indent=2))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--shards", type=int, default=6)
    options = parser.parse_args()
    total = write_bench_model(options.target, layers=options.layers, experts=options.experts, shards=options.shards)
    print(f"{options.target}: {total / 1e9:.2f} GB in {len(list(options.target.glob('*.safetensors')))} shards")


if __name__ == "__main__":
    main()

"""Memory and time of calibrating, and of dequantizing, a quantized source against the same model in BF16.

    python benchmarks/bench_sources.py [--sources bf16 fp8 gptq ...] [--layers 4] [--hidden 2048] [--work FOLDER] [--check]

Makes a random Llama (a layer of 90 MB in BF16 with the sizes given), quantizes it to each source with the `surgeon` command, and
calibrates each to int4 in groups of 32 in a process of its own. Prints peak resident memory and user CPU time of the process, and
how many layers of BF16 it holds more than the run from BF16. --check: status 1 if that is more than one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SOURCES: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "fp8": ("format=hf-fp8",),
    "gptq": ("format=gptq", "group_size=128"),
    "awq": ("format=awq", "group_size=128"),
    "ct-packed": ("format=ct-packed", "num_bits=4", "group_size=32"),
}
VOCABULARY, LENGTH = 1024, 256


class Cost(NamedTuple):
    """Of one process: peak resident bytes, and seconds of user CPU time."""

    peak: int
    user: float


def write_model(folder: Path, layers: int, hidden: int) -> int:
    """A random Llama in BF16, and the bytes of one of its layers."""
    inner = hidden * 11 // 4
    rng = np.random.default_rng(0)
    shapes = {f"self_attn.{name}_proj": (hidden if name in "qo" else hidden // 4, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) / shape[-1] ** 0.5).astype(ml_dtypes.bfloat16)

    folder.mkdir(parents=True)
    ones = np.ones(hidden, ml_dtypes.bfloat16)
    ends = {"model.embed_tokens.weight": random(VOCABULARY, hidden), "model.norm.weight": ones}
    files = {"ends": ends | {"lm_head.weight": random(VOCABULARY, hidden)}}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        files[str(layer)] = {f"{at}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        files[str(layer)] |= {f"{at}.{name}_layernorm.weight": ones for name in ("input", "post_attention")}
    index = {name: f"{file}.safetensors" for file, tensors in files.items() for name in tensors}
    for file, tensors in files.items():
        save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 512, "head_dim": 128, "vocab_size": VOCABULARY, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return 2 * sum(rows * columns for rows, columns in shapes.values())


def run(*arguments: object) -> Cost:
    """A `surgeon` command in a process of its own."""
    command = [sys.executable, "-m", "tensorsurgeon", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}: {said.decode()[-2000:]}")
    return Cost(usage.ru_maxrss * 1024, usage.ru_utime)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--method", choices=("gptq", "imatrix"), default="gptq")
    parser.add_argument("--work", type=Path, help="where models and outputs go for a while")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.sources[0] != "bf16":
        parser.error("--sources begins with bf16, which the others are compared with")
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        layer = write_model(work / "bf16", arguments.layers, arguments.hidden)
        tokens = np.random.default_rng(1).integers(3, VOCABULARY, (4, LENGTH)).tolist()
        (work / "tokens.json").write_text(json.dumps(tokens))
        print(f"{arguments.layers} layers of {layer / 1e6:.0f} MB in BF16, {4 * LENGTH} tokens, method {arguments.method}")
        found: dict[str, Cost] = {}
        most = 0.0
        for name in arguments.sources:
            if name != "bf16":
                settings = [word for setting in SOURCES[name] for word in ("--set", setting)]
                run("apply", "--quiet", "quantize-linears", work / "bf16", work / name, *settings)
                back = run("apply", "--quiet", "dequantize", work / name, work / "back")
                shutil.rmtree(work / "back")
            data = ("--calibration", work / "tokens.json", "--samples", 4, "--sequence-length", LENGTH)
            target = work / "out"
            method = ("--set", f"method={arguments.method}")
            found[name] = cost = run("apply", "--quiet", "ct-w4a16-g32", work / name, target, *method, *data)
            shutil.rmtree(target)
            more = (cost.peak - found["bf16"].peak) / layer
            most = max(most, more)
            line = f"{name:10} calibrated: peak {cost.peak / 1e6:6.0f} MB ({more:+.2f} layers), user {cost.user:5.1f} s"
            print(
                line + ("" if name == "bf16" else f"; dequantized: peak {back.peak / 1e6:.0f} MB, user {back.user:.1f} s"),
                flush=True,
            )
    finally:
        shutil.rmtree(work)
    return int(arguments.check and most > 1)


if __name__ == "__main__":
    sys.exit(main())

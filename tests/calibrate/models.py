"""Models that transformers builds from a config, small and random, saved as checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tensorsurgeon.calibrate.log import LOG_NAME, read_log
from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.planning.rewriting import steps_of
from tensorsurgeon.quant.gptq.gptq import GptqOptions
from tensorsurgeon.recipes.library import load_transform
from tests.checkpoints import FIXTURE, folder_bytes

TEXT = FIXTURE.parent / "text" / "calibration.txt"
_SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def save_random(folder: Path, kind: str) -> Path:
    """A random checkpoint of one of transformers' architectures; its experts are stored one by one."""
    import transformers

    configs: dict[str, Any] = {
        "llama": lambda: transformers.LlamaConfig(**_SIZES, num_hidden_layers=2),
        "tied": lambda: transformers.Qwen2Config(**_SIZES, num_hidden_layers=2, tie_word_embeddings=True),
        # Sliding and full attention in turn, each with its own mask and rotary embedding; scaled embeddings.
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **_SIZES, num_hidden_layers=3, head_dim=8, sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **_SIZES, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
        ),
        # Named block_sparse_moe.experts.N.w1 on disk.
        "mixtral": lambda: transformers.MixtralConfig(**_SIZES, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2),
    }  # fmt: skip
    torch.manual_seed(7)
    config = configs[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        # Initial weights are so small that rounding hides whole layers.
        parameter.data.mul_(8.0) if parameter.ndim > 1 else parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return folder


def split_fixture(folder: Path) -> Path:
    """The trained fixture with its experts stored one by one."""
    from tensorsurgeon.running.run import run_plan

    steps = steps_of(load_transform("split-experts", {"exclude": ["maybe:role:mtp"]}))
    run_plan(make_plan(steps, open_checkpoint(FIXTURE)), folder, workers=1)
    return folder


def plan_of(source: Path, *, method: str = "gptq", layout: str = "ct-packed", **fields: Any) -> Plan:
    """Quantize the linears of the decoder layers."""
    given = {"format": layout, "num_bits": 4, "group_size": 32, **fields}
    steps = steps_of(load_transform("quantize-linears", given))
    return make_plan([replace(s, method=method) if isinstance(s, Quantize) else s for s in steps], open_checkpoint(source))


def options_of(*locations: str | Path, **fields: Any) -> CalibrationOptions:
    """Few short samples and plain GPTQ, which is quick."""
    given = {"samples": 6, "sequence_length": 64, "gptq": GptqOptions(), **fields}
    return CalibrationOptions(sources=tuple(DataSource(str(x)) for x in locations or (TEXT,)), **given)


def write_ids(path: Path, *, rows: int = 6, length: int = 64, vocabulary: int = 90, seed: int = 0) -> Path:
    np.save(path, np.random.default_rng(seed).integers(0, vocabulary, (rows, length)))
    return path


def comparable(target: Path) -> dict[str, bytes]:
    """Every file of an output, with the seconds in its log left out."""
    content = folder_bytes(target)
    content[LOG_NAME] = repr([row._replace(seconds=0.0) for row in read_log(target / LOG_NAME)]).encode()
    return content

"""A small dense model and its quantized forms, for the cases of quantize, dequantize and repack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.formats.registry import FORMATS, format_named
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.running.run import run_plan
from tests.checkpoints import Tensors, read_all, write_checkpoint
from tests.ops.arrays import BF16

MLP = "model.layers.0.mlp"
CONFIG: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
FLOAT_LAYOUTS = tuple(name for name in FORMATS if format_named(name).default_scheme().type != "int")
INT_LAYOUTS = tuple(name for name in FORMATS if name not in FLOAT_LAYOUTS)


def dense(columns: int = 128, rows: int = 256, seed: int = 0) -> Tensors:
    """One MLP beside a norm, in BF16; a row of zeros and a row with an outlier in each weight."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {"model.norm.weight": np.ones(columns, BF16)}
    for name, shape in (("gate_proj", (rows, columns)), ("up_proj", (rows, columns)), ("down_proj", (columns, rows))):
        weight = rng.normal(0, 0.05, shape)
        weight[0], weight[1, 0] = 0, 3
        tensors[f"{MLP}.{name}.weight"] = weight.astype(BF16)
    return tensors


def quantize(layout: str, **fields: Any) -> Quantize:
    return Quantize(where=("{p*}.mlp.{n}.weight",), format=layout, **fields)


def write_quantized(folder: Path, layout: str, tensors: Tensors | None = None, **fields: Any) -> Path:
    """``dense()`` quantized by the engine; the folder."""
    source = write_checkpoint(folder.with_name(folder.name + "-float"), tensors or dense(), config=CONFIG)
    run_plan(make_plan(quantize(layout, **fields), open_checkpoint(source)), folder, workers=1)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def rewritten(folder: Path, source: Path, change: Any, **options: Any) -> Path:
    """``source`` again with its tensors changed by ``change(tensors)`` in place, its config as it is."""
    tensors = read_all(source)
    change(tensors)
    return write_checkpoint(folder, tensors, config=config_of(source), **options)

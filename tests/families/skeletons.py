"""Small layouts of families, as published checkpoints name and shape their tensors: specs alone, no weights."""

from __future__ import annotations

from typing import Any

from tensorsurgeon.tensors.dtypes import BF16, F32
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

HIDDEN, INNER, EXPERTS, VOCABULARY = 64, 32, 4, 512

Shapes = dict[str, tuple[int, ...]]


def attention(at: str) -> Shapes:
    """Queries, keys, values and outputs under Llama's names."""
    return {f"{at}.{x}_proj.weight": (HIDDEN if x in "qo" else HIDDEN // 2, HIDDEN) for x in "qkvo"}


def gated(at: str, width: int = INNER, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Shapes:
    """A gated MLP; Mixtral calls its linears w1, w3, w2."""
    gate, up, down = (f"{at}.{name}.weight" for name in names)
    return {gate: (width, HIDDEN), up: (width, HIDDEN), down: (HIDDEN, width)}


def numbered(at: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Shapes:
    """Experts one by one."""
    return {name: shape for e in range(EXPERTS) for name, shape in gated(f"{at}.{e}", names=names).items()}


def ends(prefix: str = "model.") -> Shapes:
    """What stands before and behind the layers."""
    return {
        f"{prefix}embed_tokens.weight": (VOCABULARY, HIDDEN),
        f"{prefix}norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }


SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INNER,
    "num_experts": EXPERTS,
    "num_hidden_layers": 1,
    "vocab_size": VOCABULARY,
}


def specs_of(shapes: Shapes, model_type: str = "unheard_of", **config: Any) -> SpecMap:
    """Specs of these shapes, matrices and up in BF16, vectors in F32, with a config of the usual sizes."""
    found = (TensorSpec(name, F32 if len(shape) < 2 else BF16, shape) for name, shape in shapes.items())
    return SpecMap(found, {"model_type": model_type, **SIZES, **config})

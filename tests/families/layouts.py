"""What layouts of families are put together from: linears and norms under their names, with a mark for what becomes of each.

``q`` is a linear that a conversion quantizes, ``-`` a tensor that stays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

H, INNER, E, V, VISION = 512, 256, 8, 1600, 128
Marked = dict[str, tuple[str, tuple[int, ...]]]
EXPERTS = {"num_experts": E, "moe_intermediate_size": INNER, "num_experts_per_tok": 2}
LAYER = "model.layers.0"


class Invented(NamedTuple):
    """A config, tensors with their marks, and for a layout that is refused words of the message."""

    config: dict[str, Any]
    tensors: Marked
    refused: str = ""


def linears(at: str, *leaves: str, shape: tuple[int, ...] = (H, H), mark: str = "q") -> Marked:
    return {f"{at}.{leaf}.weight": (mark, shape) for leaf in leaves}


def stays(at: str, *leaves: str, shape: tuple[int, ...] = (VISION, VISION)) -> Marked:
    return linears(at, *leaves, shape=shape, mark="-")


def mlp(
    at: str, leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"), width: int = INNER, mark: str = "q"
) -> Marked:
    gate, up, down = leaves
    return linears(at, gate, up, shape=(width, H), mark=mark) | linears(at, down, shape=(H, width), mark=mark)


def numbered(at: str, leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"), mark: str = "q") -> Marked:
    return {name: tensor for e in range(E) for name, tensor in mlp(f"{at}.{e}", leaves, mark=mark).items()}


def qkvo(at: str, mark: str = "q") -> Marked:
    return linears(at, "q_proj", "o_proj", mark=mark) | linears(at, "k_proj", "v_proj", shape=(H // 2, H), mark=mark)


def norms(at: str, *leaves: str) -> Marked:
    return {f"{at}.{leaf}.weight": ("-", (H,)) for leaf in leaves}


def ends(embedding: str = "model.embed_tokens", norm: str = "model.norm", head: str = "lm_head") -> Marked:
    found = {f"{embedding}.weight": ("-", (V, H)), f"{norm}.weight": ("-", (H,))}
    return found | ({f"{head}.weight": ("-", (V, H))} if head else {})


def config(model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type, "architectures": [architecture], "hidden_size": H, "num_hidden_layers": 1, "vocab_size": V,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": INNER, "torch_dtype": "bfloat16", **more,
    }  # fmt: skip

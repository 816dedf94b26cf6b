"""Roles by structure, for what no family's table names: from names, shapes and the model's config, and never a guess.

A rule either knows or says nothing. Sizes can coincide by chance, so no size decides alone: a matrix with one row per
expert is a router only beside experts.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final, NamedTuple

from tensorsurgeon.models.roles import Role

LAYERS: Final = re.compile(r"(?:^|_)(?:layers?|blocks?|h)$")
"""The last part of a path to a numbered list of layers."""


def _words(text: str) -> re.Pattern[str]:
    return re.compile(text, re.IGNORECASE)


_MTP = _words(r"^(mtp|nextn|mtp_\w+)$")
_PROJECTOR = _words(r"projector|connector|aligner|resampler|perceiver|qformer|merger|^mm_|^multi_modal|^embed_(vision|audio)$")
_VISION = _words(r"^(visual|vision|vit|image|img|siglip|pixel|patch_embed)")
_AUDIO = _words(r"^(audio|speech|sound)")

_ADAPTER = _words(r"^lora_[ab]$")
_NORM = _words(r"norm|^ln(_|\d|$)|_ln(_|$)")
_RESIDUAL = _words(r"hyper_connection|(^|_)hc(_|$)|altup|laurel|(^|_)res_proj$|^ple$|^per_layer_")
_INDEXER = _words(r"^(indexer|compressor)$|^index_")
# A linear may be called after the embedding that it projects (Gemma: `embedding_projection`).
_EMBEDDING = _words(r"embed(?!.*proj)|^w[tp]e$|relative_attention_bias")
_HEAD = _words(r"^(lm_head|head|output|output_layer|embed_out|score)$")
_POOLED = _words(r"^(pooler|classifier|cls)$")
_SHARED_GATE: Final = "shared_expert_gate"
_SHARED = _words(r"^shared?_(experts?|mlp)$")
_EXPERTS: Final = "experts"
_ROUTER: Final = "router"
_GATE = _words(r"gate|router|classifier|^wg$")
_GATES_OF_LINEAR_ATTENTION: Final = frozenset(("in_proj_a", "in_proj_b", "in_proj_ba"))
# Decays and skips of a state space are parameters of its mixer, perhaps matrices, and no linears.
_STATE: Final = frozenset(("A_log", "A", "D", "dt_bias"))
_MIXER = _words(r"(^|\.)mixer\.(in_proj|out_proj|x_proj|dt_proj)$")
_LINEAR_ATTENTION = _words(r"^(linear_attn|linear_attention|mamba\d?|mamba_\w+|ssm|short_conv|conv|recurrent|lightning_\w+)$")
_ATTENTION = _words(r"attn|attention|^att_|^self$")
_ATTENTION_LEAF = _words(r"^(([qkvo]|out|qkv|wqkv)_proj|query_key_value|wqkv|c_attn|w[qkvo](_[ab])?)$")
_MLP = _words(
    r"^(mlp|ffn|ff|feed_forward|intermediate|output|fc\d|fc_in|fc_out|c_fc|w[123]|(gate|up|down|gate_up)_proj|"
    r"ff_(proj|out)|dense_h_to_4h|dense_4h_to_h|DenseReluDense)$"
)


def is_indexer(path: str) -> bool:
    """Whether a path names a part of what chooses for sparse attention."""
    return any(_INDEXER.match(word) for word in path.split("."))


class Known(NamedTuple):
    """What is known of the model when rules are asked. ``beside_experts``: masked paths below which experts lie."""

    experts: Collection[int]
    beside_experts: Collection[str]


def part_of(head: str, is_main: bool, is_beyond: bool, path: list[str]) -> tuple[Role, str] | None:
    """The part of the model that a module belongs to: MTP head, tower, projector; None for the text model itself.

    ``head``: what stands before the first number; ``is_main``: that it leads to the text model's layers; ``path``: all
    parts of the module's name.
    """
    if is_beyond:
        return Role.MTP, "layer number beyond num_hidden_layers"
    before = head.rstrip(".").split(".") if head else path
    found = next((word for word in before if _MTP.match(word)), None)
    if found is not None or any(_MTP.match(word) for word in path):
        return Role.MTP, f"below {found or 'mtp'}"
    if is_main:
        return None
    for role, words in ((Role.PROJECTOR, _PROJECTOR), (Role.VISION, _VISION), (Role.AUDIO, _AUDIO)):
        found = next((word for word in before if words.search(word)), None)
        if found is not None:
            return role, f"below {found}"
    return None


def role_outside(path: list[str], leaf: str, shape: tuple[int, ...], hidden: int, vocabulary: int = 0) -> tuple[Role, str] | None:
    """The role of a tensor that lies in no layer; None if no rule knows it.

    ``hidden``: features that layers pass on, 0 if unknown. A matrix with another width both ways neither reads nor writes them.
    ``vocabulary``: words, 0 if unknown. One row of ``hidden`` for each is an embedding, or a head of the same shape.
    """
    words = path or [leaf]
    last = words[-1]
    if _RESIDUAL.search(last) or any(_RESIDUAL.search(word) for word in words):
        return Role.RESIDUAL, "by its name"
    if _HEAD.search(last) or any(_POOLED.match(word) for word in words):
        return Role.HEAD, "by its name"
    if _NORM.search(last) and len(shape) < 2:
        return Role.NORM, "by its name"
    if _EMBEDDING.search(last):
        return Role.EMBEDDING, "by its name"
    if _NORM.search(last):
        return Role.NORM, "by its name"
    if vocabulary and hidden and shape == (vocabulary, hidden):
        return Role.EMBEDDING, "one row per word, outside the layers"
    if len(shape) == 2 and hidden and hidden not in shape:
        return Role.OTHER, "outside the layers, with no axis of hidden_size"
    return None


def role_inside(prefix: str, path: list[str], leaf: str, shape: tuple[int, ...], known: Known) -> tuple[Role, str] | None:
    """The role of a tensor of a layer; None if no rule knows it.

    ``prefix``: the layer, masked (``model.layers.*``); ``path``: the parts of the module's name within it; ``leaf``: the
    tensor's own name.
    """
    last = path[-1] if path else leaf
    by_name = "by its name"
    if any(_ADAPTER.match(word) for word in (*path, leaf)):
        return Role.ADAPTER, by_name
    for role, words in ((Role.RESIDUAL, _RESIDUAL), (Role.INDEXER, _INDEXER)):
        if any(words.search(word) for word in (*path, leaf)):
            return role, by_name
    if _NORM.search(last) or (not path and _NORM.search(leaf)):
        return Role.NORM, by_name
    if _SHARED_GATE in path:
        return Role.SHARED_EXPERT_GATE, by_name
    if any(_SHARED.match(word) for word in path):
        return Role.SHARED_EXPERT, by_name
    if _EXPERTS in path:
        return Role.EXPERT, by_name
    if _ROUTER in path:
        return Role.ROUTER, by_name
    if _EMBEDDING.search(last):
        return Role.EMBEDDING, by_name
    if _HEAD.match(last) and len(path) > 1 and path[-2] == "shared_head":
        return Role.HEAD, by_name
    if len(shape) >= 3:
        return (Role.EXPERT, "one slice per expert") if shape[0] in known.experts else (Role.CONVOLUTION, "no matrix")
    if leaf in _STATE and path:
        return Role.LINEAR_ATTENTION, by_name
    if last in _GATES_OF_LINEAR_ATTENTION:
        return Role.LINEAR_ATTENTION_GATE, by_name
    if any(_LINEAR_ATTENTION.match(word) for word in path) or _MIXER.search(".".join(path)):
        return Role.LINEAR_ATTENTION, by_name
    if any(_ATTENTION.search(word) for word in path):
        return Role.ATTENTION, by_name
    whole = ".".join((prefix, *path))
    if last == "gate" and len(path) > 1 and _MLP.match(path[-2]):
        # A dense layer's linears are called otherwise, so this one decides among experts, if only among those to come.
        return Role.ROUTER, by_name
    is_gate = any(_GATE.search(word) for word in path) and last not in ("gate_proj", "gate_up_proj")
    beside = is_gate and any(whole.startswith(parent + ".") for parent in known.beside_experts)
    if beside and (len(shape) < 2 or shape[0] in known.experts or last == "gate"):
        return Role.ROUTER, "one row per expert, beside experts"
    if _ATTENTION_LEAF.match(last):
        return Role.ATTENTION, by_name
    if any(_MLP.match(word) for word in path):
        return Role.MLP, by_name
    if "mixer" in path:
        return Role.LINEAR_ATTENTION, by_name
    if len(shape) == 2 and shape[0] == 1:
        return Role.OTHER, "one row: a factor, and no linear"
    return None

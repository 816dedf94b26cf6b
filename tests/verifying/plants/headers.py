"""Faults in which tensors there are, in headers, shards and the index."""

from __future__ import annotations

import json
import os

import numpy as np

from tests.checkpoints import INDEX
from tests.verifying.plants.ground import Ground, kind, not_here


def without(g: Ground, *endings: str) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        names = [n for n in tensors if n.endswith(endings)]
        if not names:
            not_here()
        del tensors[names[-1]]

    g.rewritten(change)


def taken(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A tensor of this shard, taken out."""
    return tensors.pop(name) if name in tensors else not_here()


def exchange_names(g: Ground, one: str, other: str) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        ours = {n: n.replace(one, other) for n in tensors if one in n}
        theirs = {n: n.replace(other, one) for n in tensors if other in n}
        if not ours or not theirs:
            not_here()
        moved = {new: tensors.pop(old) for old, new in {**ours, **theirs}.items()}
        tensors.update(moved)

    g.rewritten(change)


@kind
def no_scale(g: Ground) -> None:
    without(g, g.scale)


@kind
def no_codes(g: Ground) -> None:
    without(g, g.main)


@kind
def no_norm(g: Ground) -> None:
    without(g, "layernorm.weight")


@kind
def no_head(g: Ground) -> None:
    without(g, "lm_head.weight")


@kind
def no_embedding(g: Ground) -> None:
    without(g, "embed_tokens.weight")


@kind
def no_module(g: Ground) -> None:
    g.rewritten(lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(f"{g.module}.")] or not_here())


@kind
def no_expert(g: Ground) -> None:
    g.rewritten(lambda tensors: [tensors.pop(n) for n in list(tensors) if ".0.mlp.experts.1." in n] or not_here())


@kind
def no_last_layer(g: Ground) -> None:
    last = max(n.split(".layers.")[1].split(".")[0] for n in g.specs if ".layers." in n)
    g.rewritten(lambda tensors: [tensors.pop(n) for n in list(tensors) if f".layers.{last}." in n] or not_here())


@kind
def a_tensor_more(g: Ground) -> None:
    g.rewritten(lambda tensors: tensors.update({f"{g.module}.extra": np.ones(4, np.float32)}))


@kind
def a_module_also_in_float(g: Ground) -> None:
    if g.main.endswith(".weight"):
        not_here()
    g.rewritten(lambda tensors: tensors.update({f"{g.module}.weight": np.ones(g.shape, np.float32)}))


@kind
def a_misspelt_name(g: Ground) -> None:
    name = g.float_named("layernorm.weight")
    g.rewritten(
        lambda tensors: tensors.update(
            {name.replace("layernorm", "layer_norm"): tensors.pop(name, None) if name in tensors else not_here()}
        )
    )


@kind
def two_experts_exchanged(g: Ground) -> None:
    exchange_names(g, ".experts.0.", ".experts.1.")


@kind
def two_layers_exchanged(g: Ground) -> None:
    exchange_names(g, ".layers.0.", ".layers.1.")


@kind
def gate_and_up_exchanged(g: Ground) -> None:
    exchange_names(g, ".gate_proj.", ".up_proj.")


@kind
def keys_and_values_exchanged(g: Ground) -> None:
    exchange_names(g, ".k_proj.", ".v_proj.")


@kind
def scales_of_another_shape(g: Ground) -> None:
    g.rewritten(
        lambda tensors: tensors.update({g.scale: (tensors[g.scale] if g.scale in tensors else not_here()).reshape(-1, 1, 1)})
    )


@kind
def codes_of_another_type(g: Ground) -> None:
    other = {1: np.uint8, 4: np.uint32}

    def change(tensors: dict[str, np.ndarray]) -> None:
        codes = tensors[g.main] if g.main in tensors else not_here()
        kind_of = other[codes.dtype.itemsize]
        tensors[g.main] = codes.view(np.int8 if codes.dtype == np.uint8 else kind_of)

    g.rewritten(change)


@kind
def a_quarter_of_the_groups(g: Ground) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        scale = tensors[g.scale] if g.scale in tensors else not_here()
        axis = 0 if g.is_transposed else scale.ndim - 1
        if scale.ndim < 2 or scale.shape[axis] < 2:
            not_here()
        tensors[g.scale] = np.ascontiguousarray(np.take(scale, range(0, scale.shape[axis], 2), axis=axis))

    g.rewritten(change)


@kind
def a_norm_of_another_width(g: Ground) -> None:
    name = g.float_named("layernorm.weight")
    g.rewritten(lambda tensors: tensors.update({name: taken(tensors, name)[:-2].copy()}))


@kind
def an_embedding_with_fewer_words(g: Ground) -> None:
    name = g.float_named("embed_tokens.weight")
    g.rewritten(lambda tensors: tensors.update({name: taken(tensors, name)[:-8].copy()}))


@kind
def a_header_that_is_none(g: Ground) -> None:
    with open(g.shards[0], "r+b") as file:
        file.seek(8)
        file.write(b"}{")


@kind
def a_shard_cut_off(g: Ground) -> None:
    os.truncate(g.shards[-1], g.shards[-1].stat().st_size - 100)


@kind
def an_empty_shard(g: Ground) -> None:
    os.truncate(g.shards[-1], 0)


@kind
def bytes_behind_a_shard(g: Ground) -> None:
    with open(g.shards[-1], "ab") as file:
        file.write(b"\0" * 64)


@kind
def a_missing_shard(g: Ground) -> None:
    if len(g.shards) < 2:
        not_here()
    g.shards[-1].unlink()


@kind
def no_index(g: Ground) -> None:
    if len(g.shards) < 2:
        not_here()
    (g.folder / INDEX).unlink()


@kind
def an_index_with_the_wrong_shard(g: Ground) -> None:
    with g.json(INDEX) as index:
        names = index["weight_map"]
        first = next(iter(names))
        names[first] = next((f for f in names.values() if f != names[first]), None) or not_here()


@kind
def an_index_without_a_tensor(g: Ground) -> None:
    with g.json(INDEX) as index:
        index["weight_map"].popitem()


@kind
def an_index_with_another_total(g: Ground) -> None:
    with g.json(INDEX) as index:
        index["metadata"]["total_size"] += 4096


@kind
def an_index_that_is_none(g: Ground) -> None:
    if not (g.folder / INDEX).exists():
        not_here()
    (g.folder / INDEX).write_text("{")


@kind
def a_leftover_of_a_stopped_run(g: Ground) -> None:
    (g.folder / "model-00009-of-00009.safetensors.partial").write_bytes(b"\0" * 64)


@kind
def the_state_of_a_stopped_run(g: Ground) -> None:
    (g.folder / ".surgeon").mkdir()
    (g.folder / ".surgeon" / "run.json").write_text(json.dumps({}))

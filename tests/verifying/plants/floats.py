"""Faults in tensors that pass through: norms, embeddings, routers, the head."""

from __future__ import annotations

import numpy as np

from tests.verifying.plants.ground import Ground, kind, not_here
from tests.verifying.plants.scales import Peek


def spoil(g: Ground, endings: tuple[str, ...], at: object, value: object) -> None:
    with g.changed(g.float_named(*endings)) as array:
        array[at] = value


@kind
def a_nan_in_a_norm(g: Ground) -> None:
    spoil(g, ("norm.weight",), 0, np.nan)


@kind
def an_infinity_in_a_norm(g: Ground) -> None:
    spoil(g, ("norm.weight",), -1, np.inf)


@kind
def a_norm_of_zeros(g: Ground) -> None:
    spoil(g, ("layernorm.weight",), ..., 0)


@kind
def an_element_of_a_norm_doubled(g: Ground) -> None:
    with g.changed(g.float_named("layernorm.weight")) as array:
        array[5] = 2 * array[5] + 1


@kind
def the_norm_of_another_layer(g: Ground) -> None:
    names = [n for n in g.specs if n.endswith("layernorm.weight")]
    if len(names) < 2:
        not_here()
    with g.changed(names[-1]) as array, Peek(g, names[0]) as other:
        array[...] = other[::-1] if np.array_equal(array, other) else other


@kind
def a_nan_in_the_embedding(g: Ground) -> None:
    spoil(g, ("embed_tokens.weight",), (3, 3), np.nan)


@kind
def an_infinity_in_the_embedding(g: Ground) -> None:
    spoil(g, ("embed_tokens.weight",), (3, 3), -np.inf)


@kind
def two_words_exchanged(g: Ground) -> None:
    with g.changed(g.float_named("embed_tokens.weight")) as array:
        array[[3, 4]] = array[[4, 3]]


@kind
def a_word_of_zeros(g: Ground) -> None:
    spoil(g, ("embed_tokens.weight",), 7, 0)


@kind
def a_page_of_the_embedding_zero(g: Ground) -> None:
    with g.changed(g.float_named("embed_tokens.weight")) as array:
        array.reshape(-1).view(np.uint8)[4096:8192] = 0


@kind
def the_lowest_bit_of_one_word(g: Ground) -> None:
    with g.changed(g.float_named("embed_tokens.weight")) as array:
        array.reshape(-1).view(np.uint8)[64] ^= 1


@kind
def a_row_of_the_head_zero(g: Ground) -> None:
    spoil(g, ("lm_head.weight",), 9, 0)


@kind
def the_head_negated(g: Ground) -> None:
    with g.changed(g.float_named("lm_head.weight")) as array:
        array[...] = -array


@kind
def the_head_is_the_embedding(g: Ground) -> None:
    with g.changed(g.float_named("lm_head.weight")) as array, Peek(g, g.float_named("embed_tokens.weight")) as other:
        array[...] = other


@kind
def two_rows_of_a_router_exchanged(g: Ground) -> None:
    with g.changed(g.float_named("mlp.gate.weight")) as array:
        array[[0, 1]] = array[[1, 0]]


@kind
def a_nan_in_a_router(g: Ground) -> None:
    spoil(g, ("mlp.gate.weight",), (0, 0), np.nan)


@kind
def a_router_of_zeros(g: Ground) -> None:
    spoil(g, ("mlp.gate.weight",), ..., 0)

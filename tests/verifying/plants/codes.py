"""Faults in codes, in the order of inputs, and in the stored shape."""

from __future__ import annotations

import numpy as np

from tests.verifying.plants.ground import Ground, kind, not_here
from tests.verifying.plants.scales import Peek, exchanged


def outputs_first(g: Ground, codes: np.ndarray) -> np.ndarray:
    """Codes or words with outputs along the first axis, a view; where words hold eight outputs, a word is a row."""
    return codes.T if g.is_transposed else codes


def zero_of(g: Ground, codes: np.ndarray) -> int:
    """A word or byte of codes that mean zero."""
    if g.claim.layout == "ct-packed":
        bits = g.claim.num_bits
        if 32 % bits:
            not_here()
        word = sum(1 << (bits - 1 + at) for at in range(0, 32, bits))
        return word - (1 << 32) if word >= 1 << 31 else word
    return -0x77777778 if g.claim.layout in ("gptq", "awq") else 0


@kind
def a_row_of_zeros(g: Ground) -> None:
    if not g.claim.symmetric:
        not_here()
    with g.changed(g.main) as codes:
        view = outputs_first(g, codes)
        view[len(view) // 2] = zero_of(g, codes)


@kind
def a_tenth_of_the_rows_zeros(g: Ground) -> None:
    if not g.claim.symmetric:
        not_here()
    with g.changed(g.main) as codes:
        outputs_first(g, codes)[::10] = zero_of(g, codes)


@kind
def all_codes_zero_bytes(g: Ground) -> None:
    with g.changed(g.main) as codes:
        codes.view(np.uint8)[...] = 0


@kind
def a_page_of_zero_bytes(g: Ground) -> None:
    with g.changed(g.main) as codes:
        codes.reshape(-1).view(np.uint8)[1024:2048] = 0


@kind
def a_page_twice(g: Ground) -> None:
    with g.changed(g.main) as codes:
        flat = codes.reshape(-1).view(np.uint8)
        flat[1024:2048] = flat[:1024]


@kind
def the_last_eighth_cut_off(g: Ground) -> None:
    with g.changed(g.main) as codes:
        flat = codes.reshape(-1).view(np.uint8)
        flat[-len(flat) // 8 :] = 0


@kind
def a_bit_of_every_tenth_byte_flipped(g: Ground) -> None:
    with g.changed(g.main) as codes:
        flat = codes.reshape(-1).view(np.uint8)
        bits = np.random.default_rng(1).integers(0, 8, len(flat[::10]))
        flat[::10] ^= (1 << bits).astype(np.uint8)


@kind
def the_top_bit_of_every_byte_flipped(g: Ground) -> None:
    with g.changed(g.main) as codes:
        codes.view(np.uint8)[...] ^= 0x80


@kind
def nibbles_exchanged(g: Ground) -> None:
    if g.claim.num_bits != 4:
        not_here()
    with g.changed(g.main) as codes:
        flat = codes.view(np.uint8)
        flat[...] = (flat >> 4) | (flat << 4)


@kind
def bytes_exchanged_in_pairs(g: Ground) -> None:
    with g.changed(g.main) as codes:
        pairs = codes.reshape(-1).view(np.uint8).reshape(-1, 2)
        pairs[...] = pairs[:, ::-1]


@kind
def two_rows_exchanged(g: Ground) -> None:
    with g.changed(g.main) as codes:
        view = outputs_first(g, codes)
        view[...] = view[exchanged(len(view))]


@kind
def rows_rolled_by_one(g: Ground) -> None:
    with g.changed(g.main) as codes:
        view = outputs_first(g, codes)
        view[...] = np.roll(view, 1, axis=0)


@kind
def rows_reversed(g: Ground) -> None:
    with g.changed(g.main) as codes:
        view = outputs_first(g, codes)
        view[...] = view[::-1].copy()


@kind
def inputs_reversed(g: Ground) -> None:
    with g.changed(g.main) as codes:
        view = outputs_first(g, codes)
        view[...] = view[:, ::-1].copy()


@kind
def inputs_rolled_by_one(g: Ground) -> None:
    with g.changed(g.main) as codes:
        view = outputs_first(g, codes)
        view[...] = np.roll(view, 1, axis=1)


@kind
def the_last_group_of_every_row_reversed(g: Ground) -> None:
    with g.changed(g.main) as codes:
        view = outputs_first(g, codes)
        size = g.claim.group_size if g.claim.group_size > 0 else 32
        count = max(2, view.shape[1] * size // g.shape[1])
        view[:, -count:] = view[:, -count:][:, ::-1].copy()


@kind
def the_first_group_of_every_row_the_last(g: Ground) -> None:
    with g.changed(g.main) as codes:
        view = outputs_first(g, codes)
        size = g.claim.group_size if g.claim.group_size > 0 else 32
        count = max(1, view.shape[1] * size // g.shape[1])
        if count * 2 > view.shape[1]:
            not_here()
        first, last = view[:, :count].copy(), view[:, -count:].copy()
        view[:, :count], view[:, -count:] = last, first


@kind
def half_of_the_rows_of_another_module(g: Ground) -> None:
    with g.changed(g.main) as codes, Peek(g, g.main.replace(g.module, g.sibling)) as theirs:
        outputs_first(g, codes)[::2] = outputs_first(g, theirs)[::2]


@kind
def the_codes_of_another_module(g: Ground) -> None:
    with g.changed(g.main) as codes, Peek(g, g.main.replace(g.module, g.sibling)) as theirs:
        codes[...] = theirs


@kind
def random_codes(g: Ground) -> None:
    with g.changed(g.main) as codes:
        flat = codes.reshape(-1).view(np.uint8)
        flat[...] = np.random.default_rng(2).integers(0, 127, len(flat))


@kind
def random_codes_in_one_row(g: Ground) -> None:
    with g.changed(g.main) as codes:
        row = outputs_first(g, codes)[5].copy().view(np.uint8)
        row[...] = np.random.default_rng(3).integers(0, 127, len(row))
        outputs_first(g, codes)[5] = row.view(codes.dtype)


@kind
def codes_one_too_high(g: Ground) -> None:
    if g.main.endswith("weight") and g.claim.num_bits == 8 and not g.claim.code_dtype.is_float:
        with g.changed(g.main) as codes:
            codes[...] = np.minimum(codes.astype(np.int16) + 12, 127).astype(np.int8)
        return
    if g.claim.layout in ("nvfp4", "mxfp4") or g.claim.num_bits != 4:
        not_here()
    with g.changed(g.main) as codes:
        nibbles = codes.reshape(-1).view(np.uint8)
        low, high = nibbles & 15, nibbles >> 4
        nibbles[...] = ((low + 1) & 15) | (((high + 1) & 15) << 4)


@kind
def codes_negated(g: Ground) -> None:
    with g.changed(g.main) as codes:
        if g.claim.code_dtype.is_float or g.claim.layout in ("nvfp4", "mxfp4"):
            codes.view(np.uint8)[...] ^= 0x88 if g.claim.num_bits == 4 else 0x80
        elif g.claim.layout == "plain":
            codes[...] = np.where(codes == -128, 127, -codes)
        else:
            codes[...] = ~codes


@kind
def a_nan_code(g: Ground) -> None:
    if not g.claim.code_dtype.is_float or g.claim.layout != "plain":
        not_here()
    with g.changed(g.main) as codes:
        codes.view(np.uint8)[4, 7] = 0x7F


@kind
def bits_behind_the_last_code(g: Ground) -> None:
    if g.claim.layout != "ct-packed" or g.shape[1] * g.claim.num_bits % 32 == 0:
        not_here()
    with g.changed(g.main) as codes:
        codes[2, -1] |= -(1 << 31)


@kind
def the_order_of_inputs_reversed(g: Ground) -> None:
    with g.changed(f"{g.module}.g_idx") as order:
        order[...] = order[::-1].copy()


@kind
def the_order_of_inputs_zero(g: Ground) -> None:
    with g.changed(f"{g.module}.g_idx") as order:
        order[...] = 0


@kind
def an_input_of_a_group_that_is_none(g: Ground) -> None:
    with g.changed(f"{g.module}.g_idx") as order:
        order[-1] = 1 << 20


@kind
def the_stored_shape_turned_over(g: Ground) -> None:
    with g.changed(f"{g.module}.weight_shape") as shape:
        shape[...] = shape[::-1].copy() if shape[0] != shape[1] else shape * 2


@kind
def the_stored_shape_too_wide(g: Ground) -> None:
    with g.changed(f"{g.module}.weight_shape") as shape:
        shape[1] += 32

"""Faults in scales and zero points."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.verifying.plants.ground import Ground, kind, not_here


def outputs_first(g: Ground, scale: np.ndarray) -> np.ndarray:
    """Scales as [N, G], a view."""
    if scale.ndim < 2:
        return scale.reshape(-1, 1)
    return scale.T if g.is_transposed else scale


def set_one(g: Ground, value: Any) -> None:
    with g.changed(g.scale) as scale:
        view = outputs_first(g, scale)
        view[len(view) // 2, -1] = value(view[len(view) // 2, -1]) if callable(value) else value


def times(factor: float) -> Any:
    """A scale times a factor, in its own type; an exponent of two is moved."""

    def changed(value: Any) -> Any:
        if value.dtype == np.uint8:
            return np.uint8(int(value) + round(np.log2(factor)))
        return (value.astype(np.float32) * np.float32(factor)).astype(value.dtype)

    return changed


def permute(g: Ground, axis: int, order: Any) -> None:
    with g.changed(g.scale) as scale:
        view = outputs_first(g, scale)
        if view.shape[axis] < 2:
            not_here()
        view[...] = np.take(view, order(view.shape[axis]), axis=axis)


def exchanged(count: int) -> list[int]:
    """The two in the middle change places."""
    order = list(range(count))
    middle = count // 2
    order[middle - 1], order[middle] = order[middle], order[middle - 1]
    return order


@kind
def a_scale_doubled(g: Ground) -> None:
    set_one(g, times(2))


@kind
def a_scale_halved(g: Ground) -> None:
    set_one(g, times(0.5))


@kind
def a_scale_sixteen_times_too_large(g: Ground) -> None:
    set_one(g, times(16))


@kind
def a_scale_zero(g: Ground) -> None:
    set_one(g, 0)


@kind
def a_scale_nan(g: Ground) -> None:
    set_one(g, 255 if g.claim.layout == "mxfp4" else np.nan)


@kind
def a_scale_infinite(g: Ground) -> None:
    if g.claim.layout in ("mxfp4", "nvfp4"):
        not_here()
    set_one(g, np.inf)


@kind
def a_scale_negative(g: Ground) -> None:
    if g.claim.layout == "mxfp4":
        not_here()
    set_one(g, times(-1))


@kind
def all_scales_a_tenth_too_large(g: Ground) -> None:
    scale_all(g, 1.1)


@kind
def all_scales_a_tenth_too_small(g: Ground) -> None:
    scale_all(g, 0.9)


@kind
def all_scales_doubled(g: Ground) -> None:
    scale_all(g, 2)


def scale_all(g: Ground, factor: float) -> None:
    with g.changed(g.scale) as scale:
        if g.claim.layout == "mxfp4":
            scale += round(np.log2(factor))
        else:
            scale[...] = (scale.astype(np.float32) * np.float32(factor)).astype(scale.dtype)


@kind
def all_scales_one(g: Ground) -> None:
    with g.changed(g.scale) as scale:
        scale[...] = 127 if g.claim.layout == "mxfp4" else 1


@kind
def all_scales_zero(g: Ground) -> None:
    with g.changed(g.scale) as scale:
        scale[...] = 0


@kind
def the_scales_of_a_row_doubled(g: Ground) -> None:
    with g.changed(g.scale) as scale:
        view = outputs_first(g, scale)
        view[3 % len(view)] = [times(2)(value) for value in view[3 % len(view)]]


@kind
def the_scales_of_two_rows_exchanged(g: Ground) -> None:
    permute(g, 0, exchanged)


@kind
def the_scales_of_two_groups_exchanged(g: Ground) -> None:
    with g.changed(g.scale) as scale:
        view = outputs_first(g, scale)
        if view.shape[1] < 2:
            not_here()
        # Of all rows the one where it does most: equal scales can be exchanged without harm.
        wide = view.astype(np.float32)
        row = int(np.argmax(np.abs(np.log(np.maximum(wide[:, 0], 1e-30) / np.maximum(wide[:, 1], 1e-30)))))
        view[row, [0, 1]] = view[row, [1, 0]]


@kind
def the_scales_of_all_rows_reversed(g: Ground) -> None:
    permute(g, 0, lambda count: np.arange(count)[::-1])


@kind
def the_scales_rolled_by_one_row(g: Ground) -> None:
    permute(g, 0, lambda count: np.roll(np.arange(count), 1))


@kind
def the_groups_of_all_rows_reversed(g: Ground) -> None:
    permute(g, 1, lambda count: np.arange(count)[::-1])


@kind
def the_scales_of_another_module(g: Ground) -> None:
    other = g.sibling
    with g.changed(g.scale) as scale, Peek(g, f"{other}.{g.claim.scale_name}") as theirs:
        scale[...] = theirs


class Peek:
    """Another tensor, read."""

    def __init__(self, g: Ground, name: str) -> None:
        from tests.checkpoints import read_all

        self._array = read_all(g.folder).get(name)

    def __enter__(self) -> np.ndarray:
        return self._array if self._array is not None else not_here()

    def __exit__(self, *_: object) -> None:
        return None


@kind
def the_scale_of_scales_doubled(g: Ground) -> None:
    with g.changed(f"{g.module}.weight_global_scale") as scale:
        scale *= 2


@kind
def the_scale_of_scales_turned_over(g: Ground) -> None:
    with g.changed(f"{g.module}.weight_global_scale") as scale:
        scale[...] = 1 / scale


@kind
def the_scale_of_scales_nan(g: Ground) -> None:
    with g.changed(f"{g.module}.weight_global_scale") as scale:
        scale[...] = np.nan


@kind
def a_zero_point_off_by_one(g: Ground) -> None:
    with g.changed(g.zeros) as zeros:
        if zeros.dtype != np.int32:
            not_here()
        words = zeros.view(np.uint32)
        words.reshape(-1)[0] ^= np.uint32(1)


@kind
def all_zero_points_off_by_one(g: Ground) -> None:
    with g.changed(g.zeros) as zeros:
        if zeros.dtype != np.int32:
            not_here()
        zeros.view(np.uint32)[...] ^= np.uint32(0x11111111 if g.claim.num_bits == 4 else 0x01010101)


@kind
def all_zero_points_zero(g: Ground) -> None:
    with g.changed(g.zeros) as zeros:
        zeros[...] = 0


@kind
def random_zero_points(g: Ground) -> None:
    with g.changed(g.zeros) as zeros:
        zeros.view(np.uint8)[...] = np.random.default_rng(0).integers(0, 256, zeros.view(np.uint8).shape)

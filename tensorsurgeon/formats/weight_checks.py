"""What a layout can hold, checked before a byte is read, with a message that says what would fit."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from tensorsurgeon.errors import SpecError
from tensorsurgeon.models.experts import stack_of
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import WEIGHT_DTYPES, DType
from tensorsurgeon.tensors.spec import TensorSpec

BLOCK: Final = (128, 128)
"""Rows x columns under one scale of block FP8; the only size that vLLM, SGLang and transformers have kernels for."""


def blocks_of(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    """Scales of a weight in blocks, those cut off at the edges included."""
    return -(-rows // block[0]), -(-columns // block[1])


def check_matrix(weight: TensorSpec, format_name: str) -> tuple[int, int]:
    """[N, K] of a float matrix; SpecError for anything else."""
    if weight.dtype not in WEIGHT_DTYPES:
        wanted = ", ".join(d.name for d in WEIGHT_DTYPES)
        raise SpecError(f"{weight.name}: {format_name} is made from {wanted} weights, found {weight.dtype}")
    if len(weight.shape) != 2:
        hint = "; split the experts first" if stack_of(weight.name) is not None else ""
        raise SpecError(f"{weight.name}: {format_name} holds matrices [out, in], found shape {list(weight.shape)}{hint}")
    if 0 in weight.shape:
        raise SpecError(f"{weight.name}: {format_name} holds no empty weight, found shape {list(weight.shape)}")
    return weight.shape[0], weight.shape[1]


def check_scheme(
    weight: TensorSpec,
    scheme: Scheme,
    format_name: str,
    *,
    kind: str = "int",
    num_bits: Collection[int] = (8,),
    symmetric: Collection[bool] = (True,),
    scale_dtypes: Collection[DType] = WEIGHT_DTYPES,
    blocks: Collection[tuple[int, int] | None] = (None,),
) -> None:
    """SpecError where the scheme has a value that ``format_name`` has no way to store."""
    _one_of(weight, format_name, "type", scheme.type, (kind,))
    _one_of(weight, format_name, "num_bits", scheme.num_bits, num_bits)
    _one_of(weight, format_name, "symmetric", scheme.symmetric, symmetric)
    _one_of(weight, format_name, "block", scheme.block, blocks)
    if scheme.scale_dtype is not None:
        _one_of(weight, format_name, "scale_dtype", scheme.scale_dtype, scale_dtypes)
    if scheme.block is not None and scheme.group_size != -1:
        raise SpecError(f"{weight.name}: block {list(scheme.block)} excludes group_size {scheme.group_size}")


def check_group_size(weight: TensorSpec, scheme: Scheme, format_name: str, allowed: Collection[int] | None = None) -> None:
    """SpecError unless ``group_size`` divides the inputs; ``allowed`` lists the sizes of layouts that fix them."""
    in_features, group_size = weight.shape[1], scheme.group_size
    if allowed is not None:
        _one_of(weight, format_name, "group_size", group_size, allowed)
    if group_size == -1:
        return
    if group_size < 1:
        raise SpecError(f"{weight.name}: group_size {group_size} is neither positive nor -1 (one group per row)")
    if in_features % group_size == 0:
        return
    near = group_sizes_near(in_features, group_size)
    if allowed is not None:
        raise SpecError(
            f"{weight.name}: group_size {group_size} does not divide in_features {in_features}, and {format_name} "
            "has no other; leave this module unquantized"
        )
    raise SpecError(
        f"{weight.name}: group_size {group_size} does not divide in_features {in_features}; "
        f"use a divisor such as {' or '.join(map(str, near))}, or -1 for one group per row"
    )


def check_multiple(weight: TensorSpec, format_name: str, *, out: int = 1, inputs: int = 1, why: str) -> None:
    """SpecError unless N is a multiple of ``out`` and K of ``inputs``; ``why`` says what they fill."""
    for axis, size, unit in (("out_features", weight.shape[0], out), ("in_features", weight.shape[1], inputs)):
        if size % unit:
            raise SpecError(
                f"{weight.name}: {format_name} needs {axis} divisible by {unit} ({why}), found {size}; "
                "leave this module unquantized or choose another format"
            )


def group_sizes_near(in_features: int, group_size: int) -> list[int]:
    """Up to two divisors of ``in_features`` next to ``group_size``, multiples of 8 where there are any."""
    divisors = [d for d in range(2, in_features + 1) if in_features % d == 0] or [in_features]
    usual = [d for d in divisors if d % 8 == 0] or divisors
    below = [d for d in usual if d < group_size][-1:]
    above = [d for d in usual if d > group_size][:1]
    return below + above


def _one_of(weight: TensorSpec, format_name: str, key: str, found: object, wanted: Collection[object]) -> None:
    if found not in wanted:
        choices = " or ".join(str(w) for w in wanted)
        raise SpecError(f"{weight.name}: {format_name} takes {key} {choices}, found {found}")

"""Experts that a checkpoint stores as stacks of codes: each becomes a float matrix of the stack that the model's class has."""

from __future__ import annotations

from collections.abc import Iterator

from tensorsurgeon.errors import SpecError
from tensorsurgeon.formats.coding import Stored
from tensorsurgeon.formats.mxfp4_blocks import CodedStack, Mxfp4Blocks, coded_stacks
from tensorsurgeon.formats.registry import formats_of
from tensorsurgeon.models.stacks import axes_of_stack
from tensorsurgeon.planning.rewriting import Rewrite
from tensorsurgeon.tensors.dtypes import DType
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec


def stored_stacks(specs: SpecMap, dtype: DType) -> Iterator[Rewrite]:
    """One rewrite for each expert of every stack; none where the checkpoint has no layout that stacks codes.

    SpecError for a stack of which nothing says how the float weights lie.
    """
    layout = next((found for found in formats_of(specs.config, specs) if isinstance(found, Mxfp4Blocks)), None)
    for stack in coded_stacks(specs) if layout is not None else ():
        axes = axes_of_stack(specs, stack.name)
        if axes is None:
            raise SpecError(
                f"{stack.blocks}: no table of a family and no class of transformers says how the experts of "
                f"{specs.config.get('model_type', 'this model')!r} lie in {stack.name}"
            )
        assert layout is not None
        yield from _experts(stack, Stored(layout, layout.default_scheme(), ("blocks", "scales"), axes == ("in", "out")), dtype)


def _experts(stack: CodedStack, stored: Stored, dtype: DType) -> Iterator[Rewrite]:
    experts, rows, columns = stack.shape
    groups = stack.blocks.shape[2]
    whole = TensorSpec(stack.name, dtype, (experts, columns, rows) if stored.transposed else stack.shape)
    each = whole.shape[1]
    for expert in range(experts):
        first = expert * rows
        codes = Region(stack.blocks, first * groups, (first + rows) * groups)
        scales = Region(stack.scales, first, first + rows)
        yield Rewrite((codes, scales), (Region(whole, expert * each, (expert + 1) * each),), detail=stored)

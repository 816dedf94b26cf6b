"""Names to ops, to be found by grep; each is imported when it is first used."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Final

from tensorsurgeon.errors import RecipeError, did_you_mean

OPS: Final = {
    "cast": "tensorsurgeon.ops.cast:Cast",
    "concat": "tensorsurgeon.ops.concat:Concat",
    "dequantize": "tensorsurgeon.ops.dequantize:Dequantize",
    "drop": "tensorsurgeon.ops.drop:Drop",
    "expect": "tensorsurgeon.ops.expect:Expect",
    "keep": "tensorsurgeon.ops.keep:Keep",
    "quantize": "tensorsurgeon.ops.quantize:Quantize",
    "rename": "tensorsurgeon.ops.rename:Rename",
    "repack": "tensorsurgeon.ops.repack:Repack",
    "reshape": "tensorsurgeon.ops.reshape:Reshape",
    "round": "tensorsurgeon.ops.round:Round",
    "split": "tensorsurgeon.ops.split:Split",
    "split_experts": "tensorsurgeon.ops.split_experts:SplitExperts",
    "squeeze": "tensorsurgeon.ops.squeeze:Squeeze",
    "stack": "tensorsurgeon.ops.stack:Stack",
    "stack_experts": "tensorsurgeon.ops.stack_experts:StackExperts",
    "transpose": "tensorsurgeon.ops.transpose:Transpose",
    "unsqueeze": "tensorsurgeon.ops.unsqueeze:Unsqueeze",
    "unstack": "tensorsurgeon.ops.unstack:Unstack",
}


@cache
def op_named(name: str) -> type[Any]:
    """The class of an op; RecipeError with near matches if there is none."""
    if name not in OPS:
        raise RecipeError(f"unknown op {name!r}{did_you_mean(name, list(OPS))}")
    module, _, attribute = OPS[name].partition(":")
    found: type[Any] = getattr(import_module(module), attribute)
    return found

"""The layouts a user can ask for: each a format with its settings, under one name."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from tensorsurgeon.errors import RecipeError, did_you_mean
from tensorsurgeon.formats.base import Format
from tensorsurgeon.formats.registry import format_class

LAYOUTS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "autoround": ("autoround", {}),
    "autoround-awq": ("autoround", {"packing_format": "auto_round:auto_awq"}),
    "awq": ("awq", {}),
    "ct-float": ("ct_float", {}),
    "ct-int": ("ct_int", {}),
    "ct-mxfp4": ("ct_mxfp4", {}),
    "ct-nvfp4": ("ct_nvfp4", {}),
    "ct-packed": ("ct_packed", {}),
    "gptq": ("gptq", {}),
    "gptq-v2": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "hf-fp8": ("hf_fp8", {}),
    "quark-fp8": ("quark_fp8", {}),
    "quark-int4": ("quark_int4", {"pack_method": "order"}),
    "quark-int4-reorder": ("quark_int4", {"pack_method": "reorder"}),
    "quark-int8": ("quark_int8", {}),
}


@cache
def layout_named(name: str) -> Format:
    """The format of this name, set up; RecipeError with near matches if there is none."""
    if name not in LAYOUTS:
        raise RecipeError(f"unknown format {name!r}{did_you_mean(name, list(LAYOUTS))}")
    registered, settings = LAYOUTS[name]
    return format_class(registered)(**settings)

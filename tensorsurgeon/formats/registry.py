"""Every format by name, and the format of a checkpoint by its ``quantization_config``."""

from __future__ import annotations

from importlib import import_module
from typing import Final

from tensorsurgeon.errors import RecipeError, did_you_mean
from tensorsurgeon.formats.base import Format

FORMATS: Final[dict[str, str]] = {
    "ct_int": "tensorsurgeon.formats.ct_int:CtInt",
    "ct_packed": "tensorsurgeon.formats.ct_packed:CtPacked",
    "ct_float": "tensorsurgeon.formats.ct_float:CtFloat",
    "ct_nvfp4": "tensorsurgeon.formats.ct_fp4:CtNvfp4",
    "ct_mxfp4": "tensorsurgeon.formats.ct_fp4:CtMxfp4",
    "gptq": "tensorsurgeon.formats.gptq:Gptq",
    "quark_int8": "tensorsurgeon.formats.quark_int8:QuarkInt8",
}


def format_class(name: str) -> type[Format]:
    """The class of a format; RecipeError for an unknown name."""
    target = FORMATS.get(name)
    if target is None:
        raise RecipeError(f"unknown format {name!r}{did_you_mean(name, list(FORMATS))}")
    module, _, class_name = target.partition(":")
    found: type[Format] = getattr(import_module(module), class_name)
    return found

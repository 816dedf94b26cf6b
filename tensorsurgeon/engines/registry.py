"""Engines by name, to be found by grep; each is imported when it is first asked."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Final

from tensorsurgeon.engines.base import Engine
from tensorsurgeon.errors import RecipeError, did_you_mean

ENGINES: Final = {
    "vllm": "tensorsurgeon.engines.vllm:VLLM",
    "sglang": "tensorsurgeon.engines.sglang:SGLANG",
    "transformers": "tensorsurgeon.engines.transformers:TRANSFORMERS",
}


@cache
def engine_named(name: str) -> Engine:
    """The engine of this name; RecipeError with near matches if there is none."""
    if name not in ENGINES:
        raise RecipeError(f"unknown engine {name!r}{did_you_mean(name, list(ENGINES))}")
    module, _, attribute = ENGINES[name].partition(":")
    found: Engine = getattr(import_module(module), attribute)
    return found

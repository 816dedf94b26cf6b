"""Every format by the name that users write, and the format of a checkpoint by its ``quantization_config``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any, Final, NamedTuple

from tensorsurgeon.checkpoint.quantization import quantization_config
from tensorsurgeon.errors import ConfigError, RecipeError, did_you_mean
from tensorsurgeon.formats.base import Format
from tensorsurgeon.formats.config_reading import TOP
from tensorsurgeon.tensors.spec import SpecMap

__all__ = (
    "FORMATS", "READ_ONLY", "Entry", "detect", "format_class", "format_named", "formats_of", "name_of", "quantization_config",
)  # fmt: skip


class Entry(NamedTuple):
    """``quant_method`` of the config that the format writes, its class as ``module:Class``, and the class's settings."""

    quant_method: str
    target: str
    settings: Mapping[str, Any] = {}


_HERE: Final = "tensorsurgeon.formats."
FORMATS: Final[dict[str, Entry]] = {
    "autoround": Entry("auto-round", _HERE + "autoround:AutoRound"),
    "autoround-awq": Entry("auto-round", _HERE + "autoround:AutoRound", {"packing_format": "auto_round:auto_awq"}),
    "awq": Entry("awq", _HERE + "awq:Awq"),
    "ct-float": Entry("compressed-tensors", _HERE + "ct_float:CtFloat"),
    "ct-int": Entry("compressed-tensors", _HERE + "ct_int:CtInt"),
    "ct-mxfp4": Entry("compressed-tensors", _HERE + "ct_mxfp4:CtMxfp4"),
    "ct-nvfp4": Entry("compressed-tensors", _HERE + "ct_nvfp4:CtNvfp4"),
    "ct-packed": Entry("compressed-tensors", _HERE + "ct_packed:CtPacked"),
    "gptq": Entry("gptq", _HERE + "gptq:Gptq"),
    "gptq-v2": Entry("gptq", _HERE + "gptq:Gptq", {"checkpoint_format": "gptq_v2"}),
    "hf-fp8": Entry("fp8", _HERE + "hf_fp8:HfFp8"),
    "quark-fp8": Entry("quark", _HERE + "quark_fp8:QuarkFp8"),
    "quark-int4": Entry("quark", _HERE + "quark_int4:QuarkInt4", {"pack_method": "order"}),
    "quark-int4-reorder": Entry("quark", _HERE + "quark_int4:QuarkInt4", {"pack_method": "reorder"}),
    "quark-int8": Entry("quark", _HERE + "quark_int8:QuarkInt8"),
}

READ_ONLY: Final[dict[str, Entry]] = {
    "deepseek-fp4": Entry("fp8", _HERE + "deepseek_fp4:DeepSeekFp4"),
    "fbgemm-fp8": Entry("fbgemm_fp8", _HERE + "hf_fp8:HfFp8"),
    "modelopt-fp8": Entry("modelopt", _HERE + "modelopt_fp8:ModelOptFp8"),
    "modelopt-nvfp4": Entry("modelopt", _HERE + "modelopt_nvfp4:ModelOptNvfp4"),
    "mxfp4": Entry("mxfp4", _HERE + "mxfp4_blocks:Mxfp4Blocks"),
}
"""Formats that checkpoints are published in and that nothing here writes."""


def format_class(name: str) -> type[Format]:
    """The class of a format; RecipeError with near matches for an unknown name."""
    entry = FORMATS.get(name)
    if entry is None:
        raise RecipeError(f"unknown format {name!r}{did_you_mean(name, list(FORMATS))}")
    return _loaded(entry.target)


@cache
def format_named(name: str) -> Format:
    """The format of this name, set up; RecipeError with near matches if there is none."""
    return format_class(name)(**FORMATS[name].settings)


def name_of(layout: Format) -> str:
    """What users write for a format with its settings; the class's own name for settings that nobody writes."""
    return next((name for name in FORMATS if format_named(name) == layout), layout.name)


def formats_of(config: Mapping[str, Any], specs: SpecMap) -> tuple[Format, ...]:
    """The formats in which a checkpoint is stored, set up as its config says; none if it is not quantized.

    ``config`` is the whole ``config.json``. ConfigError for a quantization that no format here reads.
    """
    found = quantization_config(config)
    if found is None:
        if isinstance(config.get("quantization"), Mapping) and "bits" in config["quantization"]:
            raise ConfigError("config.json has a quantization as MLX writes it, which cannot be read; use the original model")
        return ()
    method = found.get("quant_method")
    classes = [_loaded(target) for target in dict.fromkeys(e.target for e in _readable() if e.quant_method == method)]
    if not classes:
        known = sorted({entry.quant_method for entry in _readable()})
        raise ConfigError(f"{TOP}.quant_method: cannot read {method!r}; known: {', '.join(known)}")
    path, values = classes[0].word_in(found, specs)
    for value in values:
        if not any(value in candidate.words for candidate in classes):
            words = dict.fromkeys(str(word) for candidate in classes for word in candidate.words)
            raise ConfigError(f"{path}: cannot read {value!r}; known: {', '.join(words)}")
    return tuple(c.from_config(found, specs) for c in classes if any(value in c.words for value in values))


def detect(config: Mapping[str, Any], specs: SpecMap) -> Format | None:
    """The one format of a checkpoint, None if it is not quantized; ConfigError if it has several."""
    formats = formats_of(config, specs)
    if len(formats) > 1:
        named = ", ".join(sorted(layout.name for layout in formats))
        raise ConfigError(f"{TOP}: several layouts in one checkpoint ({named})")
    return formats[0] if formats else None


def _readable() -> Iterator[Entry]:
    yield from FORMATS.values()
    yield from READ_ONLY.values()


def _loaded(target: str) -> type[Format]:
    module, _, class_name = target.partition(":")
    found: type[Format] = getattr(import_module(module), class_name)
    return found

"""The small files of the output: config.json and its kin, derived from the tensors that are written.

The model's config is edited, never rewritten: unknown keys stay, in their order.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.quantization import FILES, quantization_config, without_quantization
from tensorsurgeon.checkpoint.telling import tells_of_source
from tensorsurgeon.errors import PlanError
from tensorsurgeon.formats.base import ConfigFiles, Format, QuantizedModel
from tensorsurgeon.formats.coding import Written, each_object_once, stored_in, written_by
from tensorsurgeon.formats.mixed import mixed_config_files
from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.models.floats import unquantized_linears
from tensorsurgeon.models.roles import Role
from tensorsurgeon.planning.resolving import Resolved
from tensorsurgeon.planning.rewriting import details_of
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16, F16, F32, WEIGHT_DTYPES
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

CONFIG_NAME = "config.json"
# Stale as soon as config.json changes.
QUANTIZATION_FILES = FILES
_WORDS: Final = {BF16: "bfloat16", F16: "float16", F32: "float32"}


class OutputFiles(NamedTuple):
    """``contents``: files made by the plan; ``copied``: side files of the source that travel along unchanged; ``stale``: those
    that this program made to tell of the source, which stay behind."""

    contents: dict[str, bytes]
    copied: tuple[str, ...]
    stale: tuple[str, ...] = ()


def written_modules(resolved: Resolved) -> dict[str, Written]:
    """The quantized modules that steps made, by their final names, in file order."""
    modules: dict[str, Written] = {}
    ways = {id(detail): written_by(detail) for rewrites in resolved.rewrites for detail in details_of(rewrites)}
    for name in resolved.specs:
        module = name.rpartition(".")[0]
        if module in modules:
            continue
        pieces = resolved.contents[name]
        if not pieces or pieces[0][0] >= 0:
            continue
        task = resolved.tasks[resolved.made[-1 - pieces[0][0]][0]]
        written = ways[id(task.rewrite[3])]
        if written is not None:
            modules[module] = written
    return modules


def output_files(source: Checkpoint, resolved: Resolved, quantized: Mapping[str, Written]) -> OutputFiles:
    """config.json as the written tensors demand it, extra files of the format, and the side files that stay."""
    specs = resolved.specs
    contents: dict[str, bytes] = {}
    config: dict[str, Any] = copy.deepcopy(dict(source.config))
    if any(stored_in(detail) for rewrites in resolved.rewrites for detail in details_of(rewrites)):
        # Codes that were unpacked are floats now, or quantized anew; ``dtype`` stays: the model computes in it.
        config = without_quantization(config)
    config = _with_dtype(config, source.specs, specs, quantized)
    if quantized:
        found = quantization_config(config) or config.get("quantization_config")
        if found:
            method = found.get("quant_method", "an unknown method") if isinstance(found, Mapping) else repr(found)
            raise PlanError(
                f"config.json says that the source is already quantized ({method}); quantize the original instead, "
                "or dequantize this one first"
            )
        _refuse_tied_head(specs, quantized)
        files = _quantization_files(specs, quantized)
        config["quantization_config"] = files.quantization_config
        contents.update({name: _as_json(content) for name, content in files.extra_files.items()})
    elif (kept := quantization_config(config)) is not None:
        _refuse_stale_names(kept, source.specs, specs)
    if source.config_text is not None or quantized:
        unchanged = source.config_text is not None and config == source.config
        contents[CONFIG_NAME] = source.config_text if unchanged and source.config_text else _as_json(config)
    outdated = set(QUANTIZATION_FILES) if config != source.config else set()
    stale = tuple(name for name in source.side_files if tells_of_source(source.root, name))
    copied = tuple(name for name in source.side_files if name not in contents and name not in outdated and name not in stale)
    return OutputFiles(contents, copied, stale)


def _with_dtype(config: dict[str, Any], before: SpecMap, after: SpecMap, quantized: Container[str]) -> dict[str, Any]:
    """The config with the dtype that a cast gave to every matrix: readers would round to the old one again.

    Scales of quantized modules say nothing of the model.
    """
    said = {key: value for key, value in config.items() if key in ("dtype", "torch_dtype") and isinstance(value, str)}
    matrices = [spec for spec in describe_model(after).floats if spec.module not in quantized]
    dtypes = {spec.dtype for spec in matrices}
    if not said or len(dtypes) != 1 or not any(_is_cast(before.get(spec.name), spec) for spec in matrices):
        return config
    word = _WORDS[dtypes.pop()]
    changed: dict[str, Any] = {key: ("torch." if value.startswith("torch.") else "") + word for key, value in said.items()}
    return {**config, **changed}


def _is_cast(before: TensorSpec | None, after: TensorSpec) -> bool:
    return before is not None and before.dtype in WEIGHT_DTYPES and before.dtype is not after.dtype


def _refuse_stale_names(kept: Mapping[str, Any], before: SpecMap, after: SpecMap) -> None:
    """A quantization that stays must not name modules that are gone: an engine would quantize what the entry kept out."""
    lost = _module_paths(before) - _module_paths(after)
    for name in _words(kept):
        if name in lost:
            raise PlanError(
                f"{name}: quantization_config names this module, which the output would not have under that name; "
                "dequantize first, or rename and drop before quantizing"
            )


def _refuse_tied_head(specs: SpecMap, quantized: Iterable[str]) -> None:
    """A head that the config ties to the embedding is never read: the model would answer with the embedding, in floats.

    Whether the tensor is a copy of the embedding, so that untying changes nothing, no header tells.
    """
    if specs.config_value("tie_word_embeddings") is not True:
        return
    model = describe_model(specs)
    for module in quantized:
        if model.module_use(module).role is Role.HEAD:
            raise PlanError(
                f"{module}: config.json says tie_word_embeddings, so that readers take the embedding as the head and would "
                f"not read this one; leave {module} out of what is quantized, or, if the tensor is the head that the model "
                "should have, say tie_word_embeddings false in the config.json of the source"
            )


def _module_paths(specs: SpecMap) -> set[str]:
    paths: set[str] = set()
    for name in specs:
        module = name.rpartition(".")[0]
        while module and module not in paths:
            paths.add(module)
            module = module.rpartition(".")[0]
    return paths


def _words(value: Any) -> Iterator[str]:
    """Every string in a config, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _words(item)
    elif isinstance(value, list):
        for item in value:
            yield from _words(item)


def _quantization_files(specs: SpecMap, quantized: Mapping[str, Written]) -> ConfigFiles:
    # Told apart with their settings: GPTQ v1 and v2 have one name and different words, which one config cannot describe.
    ways: dict[Format, tuple[set[Scheme], set[str | None]]] = {}
    for written in each_object_once(quantized.values()):
        schemes, activations = ways.setdefault(written.format, (set(), set()))
        schemes.add(written.scheme)
        activations.add(written.activations)
    model = QuantizedModel(
        modules={module: written.scheme for module, written in quantized.items()},
        unquantized=unquantized_linears(specs, quantized),
        specs=specs,
    )
    if len(ways) > 1:
        return mixed_config_files(model, ways)
    ((layout, (_, activations)),) = ways.items()
    options = {} if activations == {None} else {"activations": sorted(map(str, activations))}
    return layout.config_files(replace(model, options=options))


def _as_json(content: Mapping[str, Any]) -> bytes:
    # Half a character, which JSON can say and UTF-8 cannot, stays the escape that it was.
    return json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"

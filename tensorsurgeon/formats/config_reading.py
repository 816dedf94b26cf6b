"""Reading a ``quantization_config`` that any tool wrote: every value is taken from somewhere that can be named.

Dialects differ in what they leave out: some write every null, some no empty field, all of them add keys of their
own at the top level. What decides how bytes are read must be there and must be understood.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from tensorsurgeon.errors import ConfigError, did_you_mean
from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import DType
from tensorsurgeon.tensors.spec import SpecMap

TOP = "quantization_config"


def section(config: Mapping[str, Any], key: str, path: str = TOP) -> Mapping[str, Any]:
    """The mapping under ``key``; ConfigError if there is none."""
    value = config.get(key)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}.{key}: expected a mapping, found {value!r}")
    return value


def one_of(config: Mapping[str, Any], key: str, wanted: Collection[Any], path: str = TOP, default: Any = None) -> Any:
    """The value of ``key``, ``default`` where it is absent or null; ConfigError if it is none of ``wanted``."""
    value = config.get(key)
    value = default if value is None else value
    if not any(value is w or (value == w and isinstance(value, bool) == isinstance(w, bool)) for w in wanted):
        raise ConfigError(f"{path}.{key}: found {value!r}, can read {' or '.join(repr(w) for w in wanted)}")
    return value


def integer(config: Mapping[str, Any], key: str, path: str = TOP, default: int | None = None) -> int:
    """An integer; ConfigError if absent (without a default) or anything else."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{path}.{key}: expected an integer, found {value!r}")
    return value


def boolean(config: Mapping[str, Any], key: str, path: str = TOP, default: bool | None = None) -> bool:
    """A boolean; ConfigError if absent (without a default) or anything else."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigError(f"{path}.{key}: expected true or false, found {value!r}")
    return value


def block_size(config: Mapping[str, Any], key: str, path: str = TOP) -> tuple[int, int]:
    """Rows and columns of a block; ConfigError for anything else."""
    value = config.get(key)
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(v) is int and v > 0 for v in value):
        raise ConfigError(f"{path}.{key}: expected [rows, columns], found {value!r}")
    return value[0], value[1]


def strings(config: Mapping[str, Any], key: str, path: str = TOP) -> tuple[str, ...]:
    """A list of strings, empty where absent or null."""
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{path}.{key}: expected a list of strings, found {value!r}")
    return tuple(value)


def only_keys(config: Mapping[str, Any], known: Collection[str], path: str) -> None:
    """ConfigError for a key that may change what the bytes mean; empty values change nothing."""
    for key, value in config.items():
        if key not in known and value not in (None, {}, [], False):
            raise ConfigError(f"{path}.{key}: unknown key with value {value!r}{did_you_mean(key, sorted(known))}")


def modules_with(specs: SpecMap, marker: str, dtypes: Collection[object] | None = None) -> list[str]:
    """Modules that own a matrix called ``marker`` (of one of ``dtypes``), in file order."""
    suffix = "." + marker
    return [
        name[: -len(suffix)]
        for name, spec in specs.items()
        if name.endswith(suffix) and len(spec.shape) == 2 and (dtypes is None or spec.dtype in dtypes)
    ]


def schemes_of(
    stored: Iterable[str],
    specs: SpecMap,
    scheme_for: Callable[[str], Scheme | None],
    *,
    scale_name: str,
    unquantized_key: str,
    float_by_tensors: bool = False,
) -> dict[str, Scheme]:
    """The scheme of each module in ``stored``, which own quantized tensors, once config and tensors agree.

    ``scheme_for``: what the config says of a module, None for "not quantized"; ``unquantized_key``: where it says
    so. ``scale_name``: the tensor beside each module whose dtype becomes the scheme's ``scale_dtype``.
    ConfigError if a stored module is not quantized by the config or has no scales, or a float matrix is quantized
    by it. With ``float_by_tensors`` the last is no error: readers of that dialect look at the tensors.
    """
    schemes: dict[str, Scheme] = {}
    with_dtype: dict[tuple[int, DType], Scheme] = {}
    for module in stored:
        scheme = scheme_for(module)
        if scheme is None:
            raise ConfigError(f"{TOP}.{unquantized_key}: says {module} is not quantized, but its tensors are")
        scale = specs.get(f"{module}.{scale_name}")
        if scale is None:
            raise ConfigError(f"{module}: stored quantized, but the checkpoint has no {module}.{scale_name}")
        key = (id(scheme), scale.dtype)
        if key not in with_dtype:
            with_dtype[key] = replace(scheme, scale_dtype=scale.dtype)
        schemes[module] = with_dtype[key]
    if not schemes:
        raise ConfigError(f"{TOP}: no module of the checkpoint has the tensors that this config describes")
    model = describe_model(specs)
    for module in () if float_by_tensors else model.linears_with_config():
        # Tools that load through transformers never see an MTP head, so their configs say nothing about it.
        if not model.is_mtp(module) and module not in schemes and scheme_for(module) is not None:
            found = specs[module + ".weight"]
            raise ConfigError(f"{TOP}.{unquantized_key}: nothing keeps {module} out, but it is stored unquantized ({found})")
    return schemes

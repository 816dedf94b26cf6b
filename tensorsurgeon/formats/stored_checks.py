"""The stored tensors of a quantized module against what its format and config call for, before any of them is read.

Names alone say little: with other groups than the config says, codes and scales multiply into another weight, or into
none at all after an hour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tensorsurgeon.errors import ConfigError
from tensorsurgeon.formats.base import Format
from tensorsurgeon.models.fused import describe
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import F8_E8M0, U8, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

_CODES: Final = ("weight", "weight_packed", "qweight")
# What only a quantized module has beside its codes.
_COMPANIONS: Final = frozenset((
    "qzeros", "g_idx", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point",
    "weight_shape",
))  # fmt: skip


def check_stored(
    module: str, tensors: Mapping[str, TensorSpec], layout: Format, scheme: Scheme, weight_dtype: DType
) -> tuple[int, int]:
    """[N, K] of the weight that ``tensors`` (by local name) stand for.

    ConfigError with the module's name, what was wanted and what was found for a tensor that is missing or of another
    dtype or shape.
    """
    for local in layout.local_names(scheme):
        if local not in tensors and local not in layout.optional:
            raise ConfigError(f"{module}: stored quantized ({layout.name}), but the checkpoint has no {module}.{local}")
    if scheme.scale_dtype is not None and not scheme.scale_dtype.is_float:
        raise ConfigError(f"{module}: its scales are stored as {scheme.scale_dtype}, which is no float")
    try:
        shape = layout.weight_shape(tensors, scheme)
    except ConfigError as error:
        raise ConfigError(f"{module}.{error.message}") from error
    weight = TensorSpec("weight", weight_dtype, shape)
    for wanted in layout.tensors(weight, scheme):
        found = tensors.get(wanted.name)
        if found is None or _fits(found, wanted):
            continue
        others = [spec for spec in layout.also_reads(weight, scheme) if spec.name == wanted.name]
        if not any(_fits(found, other) for other in others):
            raise ConfigError(
                f"{module}.{wanted.name}: a weight {list(shape)} of {describe(scheme)} in {layout.name} has "
                f"{wanted.dtype} {list(wanted.shape)}, but the file has {found.dtype} {list(found.shape)}; config and "
                "tensors contradict each other"
            )
    return shape


def refuse_left_behind(spec: TensorSpec) -> None:
    """ConfigError for codes or scales of a module that the config says nothing of, or whose codes are not there."""
    local = spec.name.rpartition(".")[2]
    narrow_float = spec.dtype.is_float and spec.dtype.bits < 16
    if narrow_float or local in _COMPANIONS or (not spec.dtype.is_float and len(spec.shape) > 1 and local in _CODES):
        raise ConfigError(
            f"{spec.name}: stored as {spec.dtype} {list(spec.shape)}, but its module is none that config and tensors agree "
            "to be quantized; it would be left without a meaning once the config is gone"
        )


def lies_beside_codes(scale: TensorSpec, specs: SpecMap) -> bool:
    """Whether a tensor belongs to a module with a weight of its own, and not to an attention that has linears."""
    return any(f"{scale.module}.{name}" in specs for name in _CODES)


def axes(tensors: Mapping[str, TensorSpec], name: str, count: int = 2) -> tuple[int, ...]:
    """The shape of a module's tensor; ConfigError, which begins with its local name, if it has other than ``count`` axes."""
    shape = tensors[name].shape
    if len(shape) != count:
        raise ConfigError(f"{name}: has {count} axes in this layout, but the file has {list(shape)}")
    return shape


def _fits(found: TensorSpec, wanted: TensorSpec) -> bool:
    same_dtype = found.dtype is wanted.dtype or {found.dtype, wanted.dtype} == {U8, F8_E8M0}
    return same_dtype and (found.shape == wanted.shape or _without_ones(found.shape) == _without_ones(wanted.shape))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)

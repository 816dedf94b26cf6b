"""AMD Quark FP8: ``weight`` F8_E4M3 [N, K] and ``weight_scale`` F32 [N], activations per token at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tensorsurgeon.formats import quark_config
from tensorsurgeon.formats.base import ConfigFiles, QuantizedModel
from tensorsurgeon.formats.config_reading import modules_with, one_of
from tensorsurgeon.formats.coverage import activations_of
from tensorsurgeon.formats.scales import loaded_scale, scale_dtype_of, stored_scale, with_scale_dtype
from tensorsurgeon.formats.weight_checks import check_group_size, check_matrix, check_scheme
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F8_E4M3, F16, F32, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec


@dataclass(frozen=True, slots=True)
class QuarkFp8:
    """W8A8 in E4M3: one scale per output channel, activations quantized per token while running."""

    name: ClassVar[str] = "quark_fp8"
    quant_method: ClassVar[str] = "quark"
    activations: ClassVar[tuple[str, ...]] = ("dynamic",)

    def default_scheme(self) -> Scheme:
        """One scale per channel, by Quark's rule."""
        return Scheme(type="fp8", num_bits=8, rule="quark")

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """Scales are stored as F32, as Quark does from file to file."""
        return with_scale_dtype(scheme, F32)

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """Any float matrix with one scale per row."""
        check_matrix(weight, self.name)
        check_scheme(weight, scheme, self.name, kind="fp8", scale_dtypes=(F32, BF16, F16))
        check_group_size(weight, scheme, self.name, allowed=(-1,))

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``weight`` and ``weight_scale`` [N]."""
        rows, columns = weight.shape
        return (
            TensorSpec("weight", F8_E4M3, (rows, columns)),
            TensorSpec("weight_scale", scheme.scale_dtype or F32, (rows,)),
        )

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """Yes: a row has its codes and its scale."""
        return True

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """The codes as they are."""
        return quantized.codes, stored_scale(quantized.scale, scale_dtype_of(scheme), (len(quantized.codes),))

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """That of ``weight``."""
        rows, columns = tensors["weight"].shape
        return rows, columns

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """Also from [N, 1] scales."""
        codes = arrays["weight"]
        return Quantized(codes, loaded_scale(arrays["weight_scale"], (len(codes), 1)))

    def config_files(self, model: QuantizedModel) -> ConfigFiles:
        """One scheme, activations per token while running."""
        activations_of(model, self.name, self.activations)
        inputs = quark_config.tensor_config("fp8_e4m3", "per_channel", ch_axis=1, is_dynamic=True)
        return quark_config.write_config(model, _weight_config, inputs, self.name)

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with an FP8 ``weight``."""
        return quark_config.read_config(config, specs, modules_with(specs, "weight", (F8_E4M3,)), _scheme_of)


def _weight_config(scheme: Scheme) -> dict[str, Any]:
    return quark_config.tensor_config("fp8_e4m3", "per_channel", ch_axis=0)


def _scheme_of(weight: Mapping[str, Any], path: str) -> Scheme:
    one_of(weight, "dtype", ("fp8_e4m3",), path)
    one_of(weight, "qscheme", ("per_channel",), path)
    one_of(weight, "ch_axis", (0,), path, default=0)
    return Scheme(type="fp8", num_bits=8, rule="quark")

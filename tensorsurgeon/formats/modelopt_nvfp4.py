"""ModelOpt NVFP4: ``weight`` U8 [N, K/2], ``weight_scale`` F8_E4M3 [N, K/16] and ``weight_scale_2`` F32 [].

Two E2M1 codes per byte along the inputs, the first in the low nibble. ``w = code * weight_scale * weight_scale_2``: the
second scale is the reciprocal of what compressed-tensors stores. ``input_scale`` is that of the activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tensorsurgeon.formats import modelopt_config
from tensorsurgeon.formats.config_reading import modules_with
from tensorsurgeon.formats.read_only import ReadOnly
from tensorsurgeon.formats.scales import loaded_scale
from tensorsurgeon.formats.stored_checks import axes
from tensorsurgeon.quant.bitpack import unpack_nibbles
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F8_E4M3, F32, U8, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec


@dataclass(frozen=True, slots=True)
class ModelOptNvfp4(ReadOnly):
    """Groups of 16 with E4M3 scales, under one F32 scale per weight."""

    name: ClassVar[str] = "modelopt-nvfp4"
    quant_method: ClassVar[str] = "modelopt"
    words: ClassVar[tuple[str, ...]] = ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4")
    activations: ClassVar[tuple[str, ...]] = ("none",)
    word_in = staticmethod(modelopt_config.word_in)

    def default_scheme(self) -> Scheme:
        """The only one there is."""
        return Scheme(type="nvfp4", num_bits=4, group_size=16, rule="compressed-tensors")

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """The layout fixes how scales are stored."""
        return scheme

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``weight`` and its scales."""
        rows, columns = weight.shape
        return (
            TensorSpec("weight", U8, (rows, columns // 2)),
            TensorSpec("weight_scale", F8_E4M3, (rows, scheme.groups(columns))),
            TensorSpec("weight_scale_2", F32, ()),
        )

    def local_names(self, scheme: Scheme) -> tuple[str, ...]:
        """As ``tensors`` has them."""
        return "weight", "weight_scale", "weight_scale_2"

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """No: the second scale is that of the whole weight."""
        return False

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """Nothing is written in this layout."""
        raise NotImplementedError(self.name)

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """Two codes per byte."""
        rows, columns = axes(tensors, "weight")
        return rows, columns * 2

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """Both scales multiplied, in F32, as ModelOpt does it."""
        scale = loaded_scale(arrays["weight_scale"]) * loaded_scale(arrays["weight_scale_2"]).reshape(())
        return Quantized(unpack_nibbles(arrays["weight"]), scale)

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with a ``weight`` of bytes."""
        scheme = self.default_scheme()
        stored = modules_with(specs, "weight", (U8,))
        return modelopt_config.read_config(config, specs, stored, self.words, lambda module: scheme)

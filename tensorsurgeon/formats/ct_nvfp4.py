"""compressed-tensors NVFP4: ``weight_packed`` U8 [N, K/2], E4M3 scales of groups of 16 and one global scale.

``weight_scale`` F8_E4M3 [N, K/16]; ``weight_global_scale`` F32 [1] is a *multiplier*:
``w = code * weight_scale / weight_global_scale``. (ModelOpt stores its reciprocal.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tensorsurgeon.formats.ct_fp4 import CtFp4
from tensorsurgeon.formats.scales import loaded_scale, stored_scale
from tensorsurgeon.quant.bitpack import pack_nibbles, unpack_nibbles
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F8_E4M3, F32, DType
from tensorsurgeon.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class CtNvfp4(CtFp4):
    """W4A16: groups of 16 with E4M3 scales, under one F32 scale per weight.

    vLLM takes one global scale for a fused module: siblings (q, k and v; gate and up) must be quantized with the
    same one.
    """

    name: ClassVar[str] = "ct-nvfp4"
    words: ClassVar[tuple[str, ...]] = ("nvfp4-pack-quantized",)
    grid = "nvfp4"
    group_size: ClassVar[int] = 16
    scale_dtype: ClassVar[DType] = F8_E4M3
    scale_word: ClassVar[str] = "torch.float8_e4m3fn"
    strategy: ClassVar[str] = "tensor_group"

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``weight_packed`` and its scales."""
        rows, columns = weight.shape
        return (
            TensorSpec(*self.codes, (rows, columns // 2)),
            TensorSpec("weight_scale", F8_E4M3, (rows, columns // 16)),
            TensorSpec("weight_global_scale", F32, (1,)),
        )

    def local_names(self, scheme: Scheme) -> tuple[str, ...]:
        """As ``tensors`` has them."""
        return self.codes[0], "weight_scale", "weight_global_scale"

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """No: the global scale is that of the whole weight."""
        return False

    def rows_together(self, scheme: Scheme) -> int:
        """One: to read, the global scale is known."""
        return 1

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """Two codes per byte."""
        if quantized.global_scale is None:
            raise ValueError("nvfp4 weights need a global scale")
        return (
            pack_nibbles(quantized.codes),
            stored_scale(quantized.scale, F8_E4M3),
            stored_scale(quantized.global_scale, F32, (1,)),
        )

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """The inverse of ``pack``."""
        return Quantized(
            unpack_nibbles(arrays[self.codes[0]]),
            loaded_scale(arrays["weight_scale"]),
            global_scale=loaded_scale(arrays["weight_global_scale"], (1,)),
        )

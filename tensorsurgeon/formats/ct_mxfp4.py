"""compressed-tensors MXFP4: ``weight_packed`` U8 [N, K/2] and powers of two for groups of 32.

``weight_scale`` U8 [N, K/32] has the exponents with a bias of 127 (E8M0); no global scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from tensorsurgeon.formats.ct_fp4 import CtFp4
from tensorsurgeon.formats.scales import loaded_scale, stored_scale, with_scale_dtype
from tensorsurgeon.quant.bitpack import pack_nibbles, unpack_nibbles
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F8_E8M0, U8, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec


@dataclass(frozen=True, slots=True)
class CtMxfp4(CtFp4):
    """W4A16: groups of 32 whose scales are powers of two; no global scale."""

    name: ClassVar[str] = "ct-mxfp4"
    words: ClassVar[tuple[str, ...]] = ("mxfp4-pack-quantized",)
    scale_name: ClassVar[str] = "weight_scale"
    grid = "mxfp4"
    group_size: ClassVar[int] = 32
    scale_dtype: ClassVar[DType] = F8_E8M0
    scale_word: ClassVar[str] = "torch.uint8"
    strategy: ClassVar[str] = "group"
    default_strategy: ClassVar[str | None] = "group"

    def tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
        """``weight_packed`` and its scales."""
        rows, columns = weight.shape
        return (
            TensorSpec(*self.codes, (rows, columns // 2)),
            TensorSpec(self.scale_name, U8, (rows, columns // 32)),
        )

    def local_names(self, scheme: Scheme) -> tuple[str, ...]:
        """As ``tensors`` has them."""
        return self.codes[0], self.scale_name

    def can_chunk_rows(self, scheme: Scheme) -> bool:
        """Yes: a row has its codes and its scales."""
        return True

    def pack(self, quantized: Quantized, scheme: Scheme) -> tuple[np.ndarray, ...]:
        """Two codes per byte."""
        return pack_nibbles(quantized.codes), stored_scale(quantized.scale, F8_E8M0).view(np.uint8)

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """The inverse of ``pack``."""
        exponents = arrays[self.scale_name].view(ml_dtypes.float8_e8m0fnu)
        return Quantized(unpack_nibbles(arrays[self.codes[0]].view(np.uint8)), loaded_scale(exponents))

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """As its likes; the bytes are E8M0 whether the header calls them that or U8."""
        # Named, for the class that dataclass makes with slots is not the one that a bare super() would look for.
        schemes = CtFp4.read_config(self, config, specs)
        return dict.fromkeys(schemes, with_scale_dtype(self.default_scheme(), F8_E8M0))

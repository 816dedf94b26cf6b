"""DeepSeek V4's experts: ``weight`` I8 [N, K/2] and ``scale`` F8_E8M0 [N, K/32], beside linears in block FP8.

The codes and scales of MXFP4 under other names: two E2M1 codes per byte, the first in the low nibble.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tensorsurgeon.formats.config_reading import modules_with, schemes_of
from tensorsurgeon.formats.ct_mxfp4 import CtMxfp4
from tensorsurgeon.formats.hf_fp8 import HfFp8
from tensorsurgeon.formats.read_only import ReadOnly
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import I8, DType
from tensorsurgeon.tensors.spec import SpecMap


class DeepSeekFp4(ReadOnly, CtMxfp4):
    """FP4 experts that the config of an FP8 checkpoint does not mention; their tensors tell."""

    __slots__ = ()
    name: ClassVar[str] = "deepseek-fp4"
    quant_method: ClassVar[str] = "fp8"
    words: ClassVar[tuple[str, ...]] = ("fp4",)
    codes: ClassVar[tuple[str, DType]] = ("weight", I8)
    scale_name: ClassVar[str] = "scale"
    word_in = staticmethod(HfFp8.word_in)

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with a ``weight`` of bytes and a ``scale``."""
        scheme = self.default_scheme()
        stored = [module for module in modules_with(specs, "weight", (I8,)) if f"{module}.scale" in specs]
        key = "modules_to_not_convert"
        return schemes_of(stored, specs, lambda m: scheme, scale_name="scale", unquantized_key=key, float_by_tensors=True)

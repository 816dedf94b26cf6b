"""gpt-oss as it is published: all experts of a layer in MXFP4, stacked.

``X_blocks`` U8 [E, R, K/32, 16], two E2M1 codes per byte, the first in the low nibble; ``X_scales`` U8 [E, R, K/32], E8M0.
``X`` is the name that the float stack has (``model.layers.0.mlp.experts.gate_up_proj``), whose matrices may lie the other way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tensorsurgeon.errors import ConfigError
from tensorsurgeon.formats.base import Word
from tensorsurgeon.formats.config_reading import TOP
from tensorsurgeon.formats.ct_mxfp4 import CtMxfp4
from tensorsurgeon.formats.read_only import ReadOnly
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F8_E8M0, U8, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP, _BYTES = 32, 16


class CodedStack(NamedTuple):
    """``name``: the float stack's; ``shape``: experts, rows of codes and inputs of each expert."""

    name: str
    blocks: TensorSpec
    scales: TensorSpec
    shape: tuple[int, int, int]


class Mxfp4Blocks(ReadOnly, CtMxfp4):
    """Stacks of experts, which are no modules by name; everything else in the checkpoint is float."""

    __slots__ = ()
    name: ClassVar[str] = "mxfp4"
    quant_method: ClassVar[str] = "mxfp4"
    words: ClassVar[tuple[str, ...]] = ("mxfp4",)
    codes: ClassVar[tuple[str, DType]] = ("blocks", U8)
    scale_name: ClassVar[str] = "scales"

    @staticmethod
    def word_in(config: Mapping[str, Any], specs: SpecMap) -> Word:
        """The method has one layout."""
        return Word(f"{TOP}.quant_method", ("mxfp4",))

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """None: see ``coded_stacks``."""
        return {}

    def unpack(self, arrays: Mapping[str, np.ndarray], scheme: Scheme) -> Quantized:
        """Codes of one expert, [rows * K/32, 16] bytes, and its scales [rows, K/32]."""
        scales = arrays[self.scale_name]
        packed = arrays["blocks"].reshape(len(scales), -1)
        return CtMxfp4.unpack(self, {"blocks": packed, self.scale_name: scales}, scheme)


def coded_stacks(specs: SpecMap) -> list[CodedStack]:
    """Every stack of a checkpoint in this layout; ConfigError where codes and scales do not fit, or there are none."""
    found = []
    for name, blocks in specs.items():
        if not name.endswith(_BLOCKS) or blocks.dtype is not U8:
            continue
        stem = name.removesuffix(_BLOCKS)
        scales = specs.get(stem + _SCALES)
        if scales is None:
            raise ConfigError(f"{name}: codes of MXFP4, but the checkpoint has no {stem}{_SCALES}")
        if len(blocks.shape) != 4 or blocks.shape[-1] != _BYTES or scales.shape != blocks.shape[:-1]:
            raise ConfigError(
                f"{blocks}: MXFP4 is U8 [experts, rows, groups of {_GROUP}, {_BYTES}] and scales [experts, rows, groups], but "
                f"the file has {scales}"
            )
        if scales.dtype not in (U8, F8_E8M0):
            raise ConfigError(f"{scales}: scales of MXFP4 are U8 or F8_E8M0")
        experts, rows, groups, _ = blocks.shape
        found.append(CodedStack(stem, blocks, scales, (experts, rows, groups * _GROUP)))
    if not found:
        raise ConfigError(f"{TOP}.quant_method: says mxfp4, but no tensor of the checkpoint ends in {_BLOCKS}")
    return found

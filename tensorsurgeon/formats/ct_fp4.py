"""What compressed-tensors' two FP4 layouts share: ``weight_packed`` U8 [N, K/2], two E2M1 codes per byte.

The codes lie along the inputs, the first in the low nibble. The layouts differ in their groups and in what is stored of
scales. Activations are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tensorsurgeon.formats import ct_config
from tensorsurgeon.formats.config_reading import modules_with, one_of
from tensorsurgeon.formats.ct_config import CtFormat, GroupArgs
from tensorsurgeon.formats.scales import with_scale_dtype
from tensorsurgeon.formats.stored_checks import axes
from tensorsurgeon.formats.weight_checks import check_group_size, check_matrix, check_scheme
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import U8, DType
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec


@dataclass(frozen=True, slots=True)
class CtFp4(CtFormat):
    """One grid, one group size, one dtype of scales: a layout says which, and packs them."""

    codes: ClassVar[tuple[str, DType]] = ("weight_packed", U8)
    activations: ClassVar[tuple[str, ...]] = ("none",)
    grid: ClassVar[Literal["nvfp4", "mxfp4"]]
    group_size: ClassVar[int]
    scale_dtype: ClassVar[DType]
    # What the config calls the dtype of scales and this grouping; the latter may be left unsaid where a default is given.
    scale_word: ClassVar[str]
    strategy: ClassVar[str]
    default_strategy: ClassVar[str | None] = None

    def default_scheme(self) -> Scheme:
        """The only one there is."""
        return Scheme(type=self.grid, num_bits=4, group_size=self.group_size, rule="compressed-tensors")

    def resolve_scheme(self, scheme: Scheme, weight_dtype: DType) -> Scheme:
        """The layout fixes how scales are stored."""
        return with_scale_dtype(scheme, self.scale_dtype)

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """Groups of this size must divide the inputs."""
        check_matrix(weight, self.name)
        check_scheme(weight, scheme, self.name, kind=self.grid, num_bits=(4,), scale_dtypes=(self.scale_dtype,))
        check_group_size(weight, scheme, self.name, allowed=(self.group_size,))

    def weight_shape(self, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int]:
        """Two codes per byte of ``weight_packed``."""
        rows, columns = axes(tensors, self.codes[0])
        return rows, columns * 2

    def group_args(self, activations: str) -> GroupArgs:
        """Activations stay as they are."""
        weights = ct_config.args(4, "float", self.strategy, group_size=self.group_size, scale_dtype=self.scale_word)
        return GroupArgs(self.words[0], lambda scheme: weights, lambda scheme: None)

    def read_config(self, config: Mapping[str, Any], specs: SpecMap) -> dict[str, Scheme]:
        """Modules with a ``weight_packed`` of bytes."""
        stored = modules_with(specs, self.codes[0], (U8,))

        def scheme_of(weights: ct_config.WeightArgs) -> Scheme:
            args, path = weights
            one_of(args, "type", ("float",), path)
            one_of(args, "num_bits", (4,), path)
            one_of(args, "strategy", (self.strategy,), path, default=self.default_strategy)
            one_of(args, "group_size", (self.group_size,), path)
            return self.default_scheme()

        return ct_config.read_config(config, specs, self.words[0], stored, scheme_of)

"""AMD Quark FP8: ``weight`` F8_E4M3 [N, K] and ``weight_scale`` F32 [N], activations per token at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tensorsurgeon.formats import quark_config
from tensorsurgeon.formats.base import ConfigFiles, QuantizedModel
from tensorsurgeon.formats.config_reading import modules_with, one_of
from tensorsurgeon.formats.coverage import activations_of
from tensorsurgeon.formats.plain import PlainCodes
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16, F8_E4M3, F16, F32, DType
from tensorsurgeon.tensors.spec import SpecMap


class QuarkFp8(PlainCodes):
    """W8A8 in E4M3: one scale per output channel, stored as F32 as Quark does from file to file."""

    __slots__ = ()
    name: ClassVar[str] = "quark-fp8"
    quant_method: ClassVar[str] = "quark"
    words: ClassVar[tuple[str, ...]] = ("fp8_e4m3",)
    activations: ClassVar[tuple[str, ...]] = ("dynamic",)
    codes: ClassVar[DType] = F8_E4M3
    default: ClassVar[Scheme] = Scheme(type="fp8", num_bits=8, rule="quark")
    stored_as: ClassVar[DType | None] = F32
    scale_dtypes: ClassVar[tuple[DType, ...]] = (F32, BF16, F16)
    vector: ClassVar[bool] = True
    word_in = staticmethod(quark_config.word_in)

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
    if one_of(weight, "qscheme", ("per_channel", "per_tensor"), path) == "per_tensor":
        # Read, never written.
        return Scheme(type="fp8", num_bits=8, group_size=0, rule="quark")
    one_of(weight, "ch_axis", (0,), path, default=0)
    return Scheme(type="fp8", num_bits=8, rule="quark")

"""Formats that are read and not written."""

from __future__ import annotations

from tensorsurgeon.errors import SpecError
from tensorsurgeon.formats.base import ConfigFiles, Format, QuantizedModel
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.spec import TensorSpec


class ReadOnly(Format):
    """What a format has no use for that nobody can ask ``quantize`` or ``repack`` for."""

    __slots__ = ()

    def check(self, weight: TensorSpec, scheme: Scheme) -> None:
        """Nothing can be written in it."""
        raise SpecError(f"{weight.name}: {self.name} is read, not written")

    def config_files(self, model: QuantizedModel) -> ConfigFiles:
        """Nothing can be written in it."""
        raise SpecError(f"{self.name} is read, not written")

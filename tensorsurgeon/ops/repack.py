"""Move codes from one layout to another without quantizing again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from tensorsurgeon.errors import NumericError, PlanError, SpecError, SurgeonError
from tensorsurgeon.formats.base import Format
from tensorsurgeon.formats.coding import Repacked, Stored, Written, stored_in, written_by
from tensorsurgeon.formats.registry import format_named
from tensorsurgeon.formats.scales import KV_SCALES
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.ops.row_blocks import codes_scratch, stored_pieces, stored_specs, written_rows
from tensorsurgeon.ops.stored_modules import cache_scales, model_dtype, stored_modules, unpack
from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import DType
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec


@dataclass(frozen=True, kw_only=True)
@typed_fields
class Repack:
    """Write every quantized module in the layout ``to``, keeping each integer code.

    ``symmetric``: null keeps what the config says; true drops the zero points after checking that all are zero (an
    AWQ checkpoint says ``zero_point: true`` even of symmetric weights), false adds them. ``inexact_scales``: what to
    do where the new layout's usual scale dtype cannot hold a scale exactly: ``stop`` names the module and stops,
    ``round`` goes on, ``keep`` stores scales in the dtype they have, which engines then round themselves. What the
    target cannot express is refused when the plan is made.
    """

    to: str
    symmetric: bool | None = None
    inexact_scales: Literal["stop", "round", "keep"] = "stop"
    activations: str | None = None

    @cached_property
    def layout(self) -> Format:
        return format_named(self.to)

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        dtype = model_dtype(specs)
        ways: dict[tuple[Stored, DType], Repacked] = {}
        rewrites = []
        for module in stored_modules(specs, may_drop=KV_SCALES):
            weight = TensorSpec(f"{module.name}.weight", dtype, module.shape)
            key = module.stored, weight.dtype
            if key not in ways:
                written = Written(self.layout, self._target_scheme(module.scheme, weight), self.activations, method="kept")
                ways[key] = Repacked(module.stored, written)
            repacked = ways[key]
            _refuse_other_kind(weight, module.scheme, self.layout, self.to)
            scheme = repacked.written.scheme
            self.layout.check(weight, scheme)
            outputs = [spec._replace(name=f"{module.name}.{spec.name}") for spec in self.layout.tensors(weight, scheme)]
            if not self.layout.can_chunk_rows(scheme):
                inputs = tuple(Region(specs[f"{module.name}.{local}"]) for local in module.tensors)
                rewrites.append(Rewrite(inputs, tuple(map(Region, outputs)), detail=repacked))
                continue
            for inputs, start, stop in stored_pieces(module, weight, specs):
                rewrites.append(Rewrite(inputs, written_rows(outputs, start, stop, weight.shape[0]), detail=repacked))
        if not rewrites:
            raise PlanError(
                "mxfp4: its codes lie in stacks, which repack does not cut; quantize, which dequantizes them on the way"
            )
        return (*rewrites, *cache_scales(specs))

    def _target_scheme(self, stored: Scheme, weight: TensorSpec) -> Scheme:
        symmetric = stored.symmetric if self.symmetric is None else self.symmetric
        scheme = self.layout.resolve_scheme(replace(stored, symmetric=symmetric, scale_dtype=None), weight.dtype)
        if self.inexact_scales == "keep" and stored.scale_dtype is not None:
            return self._keeping(scheme, stored.scale_dtype, weight)
        return scheme

    def _keeping(self, scheme: Scheme, stored: DType, weight: TensorSpec) -> Scheme:
        """The scheme with scales in the dtype they have; unchanged where the layout has no room for it."""
        kept = replace(scheme, scale_dtype=stored)
        try:
            self.layout.check(weight, kept)
        except SpecError:
            return scheme
        return kept

    def scratch_bytes(self, rewrite: Rewrite) -> int:
        """The codes, a byte each, as they were stored and as they will be, and scales in F32."""
        read, made = stored_specs(rewrite.inputs), stored_specs(rewrite.outputs)
        stored = stored_in(rewrite.detail)
        assert stored is not None  # plan put it there
        elements = max(spec.nbytes * 8 for spec in read) // stored.scheme.num_bits
        return codes_scratch(elements, read, 2) + codes_scratch(elements, made, 2)

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        stored, written = stored_in(rewrite.detail), written_by(rewrite.detail)
        assert stored is not None  # plan put both there
        assert written is not None
        try:
            return written.format.pack(
                self._converted(unpack(stored, inputs, rewrite.outputs[0]), written.scheme), written.scheme
            )
        except SurgeonError as error:
            remedy = error.remedy
            if "would be stored" in error.message:
                # Asked for and not done: the layout has no room for the dtype that the scales have.
                keep = "" if self.inexact_scales == "keep" else "{inexact_scales}=keep stores it as it is where the layout can, "
                remedy = f"; {keep}{{inexact_scales}}=round goes on with the nearest"
            raise NumericError(f"{rewrite.outputs[0].spec.module}: {error.message}", remedy=remedy) from error

    def _converted(self, quantized: Quantized, scheme: Scheme) -> Quantized:
        scale, zero_point = quantized.scale, quantized.zero_point
        if scheme.symmetric:
            if zero_point is not None and np.any(zero_point):
                raise NumericError(
                    f"{np.count_nonzero(zero_point)} zero points are not zero, so that the weight is asymmetric and "
                    f"{self.to} was asked for symmetric ones"
                )
            zero_point = None
        elif zero_point is None:
            zero_point = np.zeros(scale.shape, np.int8)
        if self.inexact_scales == "round" and scheme.scale_dtype is not None and scheme.scale_dtype.numpy is not None:
            scale = scale.astype(scheme.scale_dtype.numpy).astype(np.float32)
        return quantized._replace(scale=scale, zero_point=zero_point)


def _refuse_other_kind(weight: TensorSpec, scheme: Scheme, layout: Format, name: str) -> None:
    kind = layout.default_scheme().type
    if scheme.type != kind:
        raise SpecError(
            f"{weight.name}: its codes are {scheme.type}, but {name} holds {kind}; repacking keeps every code, so "
            "dequantize and quantize again to change the kind"
        )

"""How quantized weights lie on disk, one class for each layout, from the layouts' own documentation."""

from __future__ import annotations

from typing import Final

from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.tensors.spec import TensorSpec
from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.layouts.ct_packed import CtPacked
from tensorsurgeon.verifying.layouts.fp4 import Mxfp4, Nvfp4
from tensorsurgeon.verifying.layouts.plain import Plain
from tensorsurgeon.verifying.layouts.quark_packed import QuarkPacked
from tensorsurgeon.verifying.layouts.words import Awq, Gptq
from tensorsurgeon.verifying.parts import MARKERS, Part, describe_stored, is_stored_quantized
from tensorsurgeon.verifying.weights import CodedWeight

__all__ = ["LAYOUTS", "MARKERS", "Part", "describe_stored", "is_stored_quantized", "main_of", "parts_of", "stored_weight"]

LAYOUTS: Final[dict[str, type[CodedWeight]]] = {
    "plain": Plain, "ct-packed": CtPacked, "nvfp4": Nvfp4, "mxfp4": Mxfp4, "gptq": Gptq, "awq": Awq, "quark-packed": QuarkPacked,
}  # fmt: skip


def main_of(claim: Claim) -> str:
    """The local name of the tensor that holds the codes."""
    return LAYOUTS[claim.layout].MAIN


def weight_shape(main: TensorSpec, claim: Claim, stored: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """[N, K] of the weight whose main tensor this is; None if its rank fits no weight."""
    return LAYOUTS[claim.layout].shape_of(main, claim, stored) if len(main.shape) == 2 else None


def parts_of(claim: Claim, shape: tuple[int, int]) -> tuple[Part, ...]:
    """Every tensor that a module of this weight shape has under this claim, the optional ones too."""
    return LAYOUTS[claim.layout].parts(claim, shape)


def stored_weight(reader: TensorReader, module: str, claim: Claim, shape: tuple[int, int]) -> CodedWeight:
    """The weight of a module whose tensors are those of its claim."""
    return LAYOUTS[claim.layout](reader, module, claim, shape)

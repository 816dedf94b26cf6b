"""Which tensors a module has under a claim: names, element types and shapes, from the layouts' documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from tensorsurgeon.tensors.dtypes import BF16, F8_E4M3, F8_E8M0, F16, F32, I8, I32, I64, U8, DType
from tensorsurgeon.tensors.spec import TensorSpec
from tensorsurgeon.verifying.claims import Claim

FLOATS: Final = (BF16, F16, F32)
# Local names that only quantized modules have.
MARKERS: Final = frozenset({
    "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape", "weight_global_scale",
    "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale", "qweight", "qzeros", "scales", "g_idx",
    "weight_scale_2", "activation_scale",
})  # fmt: skip
# Never the weight of a quantized module, and nothing a quantized module must not have beside its weight.
_PLAIN_COMPANIONS: Final = frozenset({"bias"})
_CODE_DTYPES: Final = frozenset({"I8", "U8", "I32", "F8_E4M3", "F8_E5M2", "F4"})
MAIN: Final = {
    "plain": "weight", "ct-packed": "weight_packed", "nvfp4": "weight_packed", "mxfp4": "weight_packed",
    "gptq": "qweight", "awq": "qweight", "quark-packed": "weight",
}  # fmt: skip


class Part(NamedTuple):
    """One tensor of a module: which types and shapes it may have, and whether it must be there."""

    local: str
    dtypes: tuple[DType, ...]
    shapes: tuple[tuple[int, ...], ...]
    required: bool = True

    def describe(self) -> str:
        """``F16[4, 64]``, with every choice there is."""
        return f"{' or '.join(d.name for d in self.dtypes)}{' or '.join(str(list(s)) for s in self.shapes)}"


def is_stored_quantized(tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a module's tensors (by local name) are those of a quantized one, whatever a config says."""
    if not MARKERS.isdisjoint(tensors):
        return True
    weight = tensors.get("weight")
    return weight is not None and len(weight.shape) == 2 and weight.dtype.name in _CODE_DTYPES


def describe_stored(tensors: Mapping[str, TensorSpec]) -> str:
    """What a module stores, for a message: ``weight I8[64, 128], weight_scale F32[64]``."""
    return ", ".join(
        f"{local} {spec.dtype.name}{list(spec.shape)}" for local, spec in tensors.items() if local not in _PLAIN_COMPANIONS
    )


def weight_shape(main: TensorSpec, claim: Claim, stored_shape: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """[N, K] of the weight whose main tensor this is; None if its rank or size fits no weight.

    ``stored_shape``: what ``weight_shape`` of a packed module says; K is known from the words only up to their fill.
    """
    if len(main.shape) != 2:
        return None
    rows, columns = main.shape
    bits = claim.num_bits
    match claim.layout:
        case "ct-packed":
            if stored_shape is not None and stored_shape[0] == rows and _words(stored_shape[1], bits) == columns:
                return stored_shape
            return rows, columns * 32 // bits
        case "nvfp4" | "mxfp4":
            return rows, columns * 2
        case "gptq":
            return columns, rows * 32 // bits
        case "awq":
            return columns * 8, rows
        case "quark-packed":
            return (columns * 8, rows) if claim.transposed else (rows, columns * 8)
        case _:
            return rows, columns


def parts_of(claim: Claim, shape: tuple[int, int], *, has_g_idx: bool = False) -> tuple[Part, ...]:
    """Every tensor that a module of this weight shape has under this claim, the optional ones too."""
    rows, columns = shape
    bits = claim.num_bits
    groups = groups_of(claim, columns)
    inputs = (
        (Part("input_scale", FLOATS, ((1,), ()), required=claim.static_inputs and claim.layout == "plain"),)
        if claim.static_inputs
        else ()
    )
    match claim.layout:
        case "ct-packed":
            zeros = () if claim.symmetric else (Part("weight_zero_point", (I32,), ((_words(rows, bits), groups),)),)
            return (
                Part("weight_packed", (I32,), ((rows, _words(columns, bits)),)),
                Part("weight_scale", FLOATS, _scale_shapes(claim, shape)),
                *zeros,
                Part("weight_shape", (I64,), ((2,),)),
            )
        case "nvfp4":
            acts = (Part("input_global_scale", (F32,), ((1,),)),) if claim.static_inputs else ()
            return (
                Part("weight_packed", (U8,), ((rows, columns // 2),)),
                Part("weight_scale", (F8_E4M3,), ((rows, columns // 16),)),
                Part("weight_global_scale", (F32,), ((1,),)),
                *acts,
            )
        case "mxfp4":
            return (
                Part("weight_packed", (U8,), ((rows, columns // 2),)),
                Part("weight_scale", (U8, F8_E8M0), ((rows, columns // 32),)),
            )
        case "gptq" | "awq":
            packed = (columns, rows * 4 // 32) if claim.layout == "awq" else (_words(columns, bits), rows)
            g_idx = () if claim.layout == "awq" else (Part("g_idx", (I32,), ((columns,),), required=claim.desc_act),)
            return (
                Part("qweight", (I32,), (packed,)),
                Part("qzeros", (I32,), ((groups, _words(rows, bits)),)),
                Part("scales", (F16, BF16, F32), ((groups, rows),)),
                *g_idx,
            )
        case "quark-packed":
            per_channel = not claim.transposed
            packed = (rows, _words(columns, 4)) if per_channel else (columns, _words(rows, 4))
            zeros_shape: tuple[int, ...] = (_words(rows, 4),) if per_channel else (groups, _words(rows, 4))
            scale: tuple[tuple[int, ...], ...] = ((rows,),) if per_channel else ((groups, rows),)
            return (
                Part("weight", (I32,), (packed,)),
                Part("weight_scale", FLOATS, scale),
                Part(
                    "weight_zero_point", (I32,), (zeros_shape, *(((rows,),) if per_channel else ())), required=not claim.symmetric
                ),
                *inputs,
            )
        case _:
            return (
                Part("weight", (claim.code_dtype,), (shape,)),
                Part(claim.scale_name, FLOATS, _scale_shapes(claim, shape)),
                *_plain_zeros(claim, rows, groups),
                *inputs,
            )


def groups_of(claim: Claim, columns: int) -> int:
    """Scales along one row; a group that does not divide the row is a fault of its own."""
    if claim.block is not None:
        return -(-columns // claim.block[1])
    return 1 if claim.group_size < 1 else columns // claim.group_size


def _scale_shapes(claim: Claim, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    rows, columns = shape
    if claim.block is not None:
        return ((-(-rows // claim.block[0]), groups_of(claim, columns)),)
    if claim.group_size == 0:
        return ((1,), ()) if claim.vector_scale else ((1,), (), (1, 1))
    if claim.group_size == -1 and claim.vector_scale:
        return ((rows,),)
    return ((rows, groups_of(claim, columns)),)


def _plain_zeros(claim: Claim, rows: int, groups: int) -> tuple[Part, ...]:
    """Quark's in-memory exporter writes zero points of 0 beside symmetric codes; others write none."""
    integers = (I8, U8, I32)
    if claim.vector_scale and not claim.code_dtype.is_float:
        return (Part("weight_zero_point", integers, ((rows,), ()), required=not claim.symmetric),)
    return () if claim.symmetric else (Part("weight_zero_point", integers, ((rows, groups),)),)


def _words(count: int, num_bits: int) -> int:
    return -(-count * num_bits // 32)

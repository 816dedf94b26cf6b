"""A quantized source for steps that take floats: unpacked in F32 on the way, so that values are rounded once.

No float checkpoint lies between: the executor takes each weight from codes to codes.
"""

from __future__ import annotations

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.quantization import quantization_config
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.ops.round import Round
from tensorsurgeon.planning.rewriting import AnyTransform, reads_floats, steps_of, writes_floats


def for_source(transform: AnyTransform, source: Checkpoint) -> AnyTransform:
    """``transform``, or where it quantizes and the source is quantized already, the same between two steps more.

    The first makes F32 weights of all codes, the last rounds those that stay floats to the model's dtype: that equals
    dequantizing to F32 and quantizing that. Steps that dequantize by themselves are left as they are.
    """
    steps = steps_of(transform)
    if quantization_config(source.config) is None or not any(map(reads_floats, steps)) or any(map(writes_floats, steps)):
        return transform
    return (Dequantize(dtype="F32"), *steps, Round())

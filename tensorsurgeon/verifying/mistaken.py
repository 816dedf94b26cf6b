"""Where a weight reads as garbage: does it make sense under another reading that is often mistaken for this one?

Quark's two nibble orders, GPTQ's two ways of writing zero points, and scales of another group cannot be told apart
from headers. With the source at hand they can.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.verifying import fidelity
from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.described import Module
from tensorsurgeon.verifying.layouts import stored_weight
from tensorsurgeon.verifying.weights import Weight


def other_readings(reader: TensorReader, module: Module, source: Weight) -> str:
    """A clause that names the reading under which the weight is sound; empty if none is."""
    for claim, words in _alternatives(module.claim):
        result = fidelity.compare(module.name, source, stored_weight(reader, module.name, claim, module.shape), claim)
        if result.is_sound:
            return f"; read with {words} it has {result.snr_db:.1f} dB, so the config is wrong about that"
    return ""


def _alternatives(claim: Claim) -> Iterator[tuple[Claim, str]]:
    if claim.layout == "quark-packed":
        method = "order" if claim.interleaved else "reorder"
        yield replace(claim, interleaved=not claim.interleaved), f"pack_method {method!r}"
        yield replace(claim, unsigned=not claim.unsigned), "dtype int4" if claim.unsigned else "dtype uint4"
    elif claim.layout == "gptq":
        version = "gptq_v2 (zero points as they are)" if claim.zero_offset else "gptq v1 (zero points stored one less)"
        yield replace(claim, zero_offset=1 - claim.zero_offset), version
    elif claim.layout == "awq":
        yield replace(claim, interleaved=False), "nibbles in their natural order"

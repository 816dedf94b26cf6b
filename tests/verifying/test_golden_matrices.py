"""The judge reads what the reference tools packed, by its own reading of every layout, against what they packed it from."""

from __future__ import annotations

from typing import Any, Final

import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.tensors.dtypes import F8_E4M3
from tensorsurgeon.verifying import fidelity
from tensorsurgeon.verifying.claims import Claim
from tensorsurgeon.verifying.layouts import stored_weight
from tensorsurgeon.verifying.weights import FloatWeight
from tests.verifying.subjects import GOLDEN

MATRICES: Final = GOLDEN.parent / "matrices"


def words(layout: Any, group_size: int, **more: Any) -> Claim:
    return Claim(layout=layout, **{"num_bits": 4, "group_size": group_size, "scale_name": "scales", **more})


def quark(group_size: int = -1, **more: Any) -> Claim:
    return Claim(layout="quark-packed", num_bits=4, group_size=group_size, transposed=group_size > 0, vector_scale=True, **more)


def packed(num_bits: int, group_size: int, **more: Any) -> Claim:
    return Claim(layout="ct-packed", num_bits=num_bits, group_size=group_size, **more)


FP8: Final = {"layout": "plain", "num_bits": 8, "code_dtype": F8_E4M3}
UINT4: Final = {"unsigned": True, "symmetric": False}
CLAIMS: Final[dict[str, Claim]] = {
    "autoawq-gemm-g128": words("awq", 128, interleaved=True, symmetric=False),
    "autoawq-gemm-g32": words("awq", 32, interleaved=True, symmetric=False),
    "autoround-awq-g128-asym": words("awq", 128, interleaved=True, symmetric=False),
    "autoround-awq-g32": words("awq", 32, interleaved=True),
    "autoround_file-int4-g128": words("gptq", 128, zero_offset=1),
    "autoround_file-int4-g32": words("gptq", 32, zero_offset=1),
    "autoround_file-int4-g32-asym": words("gptq", 32, symmetric=False),
    "autoround_file-int8-g32": words("gptq", 32, num_bits=8, zero_offset=1),
    "gptqmodel-int4-channel-v1": words("gptq", -1, zero_offset=1),
    "gptqmodel-int4-g32-asym-v1": words("gptq", 32, zero_offset=1, symmetric=False),
    "gptqmodel-int4-g32-asym-v2": words("gptq", 32, symmetric=False),
    "gptqmodel-int4-g32-v2": words("gptq", 32),
    "gptqmodel-int8-g32-v1": words("gptq", 32, num_bits=8, zero_offset=1),
    "llmcompressor-fp8-block": Claim(**FP8, block=(128, 128)),
    "llmcompressor-fp8-dynamic": Claim(**FP8),
    "llmcompressor-mxfp4a16": Claim(layout="mxfp4", num_bits=4, group_size=32),
    "llmcompressor-nvfp4a16": Claim(layout="nvfp4", num_bits=4, group_size=16),
    "llmcompressor-w4a16-channel": packed(4, -1),
    "llmcompressor-w4a16-g128-asym": packed(4, 128, symmetric=False),
    "llmcompressor-w4a16-g32": packed(4, 32),
    "llmcompressor-w8a16-channel": packed(8, -1),
    "llmcompressor-w8a16-g32-asym": packed(8, 32, symmetric=False),
    "llmcompressor-w8a8": Claim(layout="plain", num_bits=8),
    "quark-fp8-channel": Claim(**FP8, vector_scale=True),
    "quark-int8": Claim(layout="plain", num_bits=8, vector_scale=True),
    "quark-int8-asym": Claim(layout="plain", num_bits=8, vector_scale=True, symmetric=False),
    "quark-int4-channel-order": quark(),
    "quark-int4-channel-reorder": quark(interleaved=True),
    "quark-int4-g32-order": quark(32),
    "quark-int4-g128-reorder": quark(128, interleaved=True),
    "quark-uint4-channel-reorder": quark(interleaved=True, **UINT4),
    "quark-uint4-g32-order": quark(32, **UINT4),
    "quark-uint4-g128-reorder": quark(128, interleaved=True, **UINT4),
}
# GPTQModel takes half the range for groups without a negative weight, of which only made-up matrices have any. Its v1
# subtracts one from whole words of zero points, and where one of them is 0 its neighbours lose one too: the judge says so.
CLIPPED: Final = {"gptqmodel-int8-g32-v1": ("edges",), "gptqmodel-int4-g32-asym-v1": ("edges",)}


@pytest.mark.parametrize("stem", CLAIMS)
def test_matrices_of_the_tool_are_their_source(stem: str) -> None:
    claim = CLAIMS[stem]
    source, stored = open_checkpoint(MATRICES / "source.safetensors"), open_checkpoint(MATRICES / f"{stem}.safetensors")
    with TensorReader(source) as original, TensorReader(stored) as reader:
        # Infinite scales of the largest weights are the tools' own; stacks are no matrices.
        modules = {name.rpartition(".")[0] for name in stored.specs} - {"extremes", "stacked", *CLIPPED.get(stem, ())}
        assert modules
        for module in modules:
            spec = source.specs.get(f"{module}.weight") or source.specs[module]
            rows, columns = spec.shape
            if claim.group_size > 0 and columns % claim.group_size:
                continue
            weight = FloatWeight(original, spec.name, (rows, columns))
            found = fidelity.compare(module, weight, stored_weight(reader, module, claim, (rows, columns)), claim)
            assert found.is_sound, found

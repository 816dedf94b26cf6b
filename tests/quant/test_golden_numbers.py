"""Codes, scales and zero points against what the tools themselves wrote (fixtures/golden/matrices)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tensorsurgeon.errors import NumericError
from tensorsurgeon.quant import bitpack
from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import dtype_named, dtype_of

MATRICES = Path(__file__).parents[2] / "fixtures" / "golden" / "matrices"

Tensors = dict[str, np.ndarray]
Reader = Callable[[Tensors, np.ndarray, Scheme], Quantized]


@cache
def load_file(path: Path) -> Tensors:
    """Arrays of a safetensors file; the library's own NumPy loader knows no BF16."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    arrays = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            values = np.frombuffer(raw[start + first : start + last], dtype_named(entry["dtype"]).numpy)
            arrays[name] = values.reshape(entry["shape"])
    return arrays


@cache
def sources() -> Tensors:
    return {name.removesuffix(".weight"): array for name, array in load_file(MATRICES / "source.safetensors").items()}


def wide(scale: np.ndarray, rows: int) -> np.ndarray:
    return scale.astype(np.float32).reshape(rows, -1)


def compressed_tensors(tensors: Tensors, weight: np.ndarray, scheme: Scheme) -> Quantized:
    rows, columns = weight.shape
    if "weight" in tensors:
        return Quantized(tensors["weight"], tensors["weight_scale"].astype(np.float32))
    scale = wide(tensors["weight_scale"], rows)
    offset = 1 << (scheme.num_bits - 1)
    codes = bitpack.unpack_rows(tensors["weight_packed"], scheme.num_bits, columns, offset=offset)
    packed_zero = tensors.get("weight_zero_point")
    if packed_zero is None:
        return Quantized(codes, scale)
    zero = bitpack.unpack_columns(packed_zero, scheme.num_bits, rows, offset=offset).T
    return Quantized(codes, scale, zero)


def compressed_tensors_fp4(tensors: Tensors, weight: np.ndarray, scheme: Scheme) -> Quantized:
    codes = bitpack.unpack_nibbles(tensors["weight_packed"])
    scale = tensors["weight_scale"]
    if scheme.type == "mxfp4":
        return Quantized(codes, np.ldexp(np.float32(1), scale.astype(np.int32) - 127).astype(np.float32))
    return Quantized(codes, scale.astype(np.float32), None, tensors["weight_global_scale"])


def gptq(version: int) -> Reader:
    def read(tensors: Tensors, weight: np.ndarray, scheme: Scheme) -> Quantized:
        rows, columns = weight.shape
        offset = 1 << (scheme.num_bits - 1)
        codes = bitpack.unpack_columns(tensors["qweight"], scheme.num_bits, columns, offset=offset)
        scale = np.ascontiguousarray(tensors["scales"].T.astype(np.float32))
        if scheme.symmetric:
            return Quantized(codes, scale)
        zeros = tensors["qzeros"]
        if version == 1:  # the tool subtracts 1 from every zero point by one subtraction from the word, borrows and all
            zeros = (zeros.view(np.uint32) + np.uint32(0x11111111)).view(np.int32)
        return Quantized(codes, scale, bitpack.unpack_transposed(zeros, scheme.num_bits, rows, offset=offset))

    return read


def awq(tensors: Tensors, weight: np.ndarray, scheme: Scheme) -> Quantized:
    rows = weight.shape[0]
    codes = bitpack.unpack_transposed(tensors["qweight"], 4, rows, offset=8, order=bitpack.AWQ_ORDER)
    scale = np.ascontiguousarray(tensors["scales"].T.astype(np.float32))
    if scheme.symmetric:
        return Quantized(codes, scale)
    zero = bitpack.unpack_transposed(tensors["qzeros"], 4, rows, offset=8, order=bitpack.AWQ_ORDER)
    return Quantized(codes, scale, zero)


def quark(order: tuple[int, ...] | None = None) -> Reader:
    def read(tensors: Tensors, weight: np.ndarray, scheme: Scheme) -> Quantized:
        rows, columns = weight.shape
        words, scale = tensors["weight"], tensors["weight_scale"].astype(np.float32)
        zero = tensors.get("weight_zero_point") if not scheme.symmetric else None
        if scheme.num_bits == 8:
            return Quantized(words, scale[:, None], None if zero is None else zero[:, None])
        offset = 0 if scheme.symmetric else 8  # uint4 counts from 0
        if scheme.group_size == -1:
            codes = bitpack.unpack_rows(words, 4, columns, offset=offset, order=order)
            if zero is not None:
                zero = bitpack.unpack_rows(zero[None], 4, rows, offset=offset, order=order).T
            return Quantized(codes, scale[:, None], zero)
        codes = bitpack.unpack_transposed(words, 4, rows, offset=offset, order=order)
        if zero is not None:
            zero = bitpack.unpack_transposed(zero, 4, rows, offset=offset, order=order)
        # file to file leaves the scale [N, G]
        return Quantized(codes, scale if scale.shape[0] == rows else np.ascontiguousarray(scale.T), zero)

    return read


class Golden(NamedTuple):
    file: str
    scheme: Scheme
    read: Reader


def goldens() -> list[Golden]:
    found: list[Golden] = []

    def add(file: str, read: Reader, **scheme: object) -> None:
        found.append(Golden(file, Scheme(**scheme), read))  # type: ignore[arg-type]

    ct = compressed_tensors
    add("llmcompressor-w8a8", ct)
    for size in (32, 128):
        add(f"llmcompressor-w4a16-g{size}", ct, num_bits=4, group_size=size)
        add(f"llmcompressor-w4a16-g{size}-asym", ct, num_bits=4, group_size=size, symmetric=False)
    add("llmcompressor-w4a16-channel", ct, num_bits=4)
    add("llmcompressor-w8a16-channel", ct)
    add("llmcompressor-w8a16-g32-asym", ct, group_size=32, symmetric=False)
    add("llmcompressor-fp8-dynamic", ct, type="fp8")
    add("llmcompressor-fp8-block", ct, type="fp8", block=(128, 128))
    add("llmcompressor-nvfp4a16", compressed_tensors_fp4, type="nvfp4", num_bits=4, group_size=16)
    add("llmcompressor-mxfp4a16", compressed_tensors_fp4, type="mxfp4", num_bits=4, group_size=32)

    for tool in ("quark", "quark_file"):
        add(f"{tool}-int8", quark(), rule="quark")
    add("quark-int8-asym", quark(), rule="quark", symmetric=False)
    for name, symmetric in (("int4", True), ("uint4", False)):
        for size in (32, 128, -1):
            strategy = "channel" if size == -1 else f"g{size}"
            scheme = {"rule": "quark", "num_bits": 4, "group_size": size, "symmetric": symmetric}
            add(f"quark-{name}-{strategy}-order", quark(), **scheme)
            add(f"quark-{name}-{strategy}-reorder", quark(bitpack.AWQ_ORDER), **scheme)
            if symmetric:
                add(f"quark_file-{name}-{strategy}", quark(), **scheme)

    for size in (32, 128):
        scheme = {"rule": "autoround", "num_bits": 4, "group_size": size}
        add(f"autoround_file-int4-g{size}", gptq(1), **scheme)
        add(f"autoround_file-int4-g{size}-asym", gptq(2), **scheme, symmetric=False)
        add(f"autoround-awq-g{size}-asym", awq, **{**scheme, "rule": "awq"}, symmetric=False)
    add("autoround_file-int8-g32", gptq(1), rule="autoround", group_size=32)
    add("autoround-awq-g32", awq, rule="awq", num_bits=4, group_size=32)

    for version in (1, 2):
        add(f"gptqmodel-int4-g32-v{version}", gptq(version), rule="gptq", num_bits=4, group_size=32)
        add(
            f"gptqmodel-int4-g32-asym-v{version}",
            gptq(version),
            rule="gptq",
            num_bits=4,
            group_size=32,
            symmetric=False,
        )
    add("gptqmodel-int4-g128-v1", gptq(1), rule="gptq", num_bits=4, group_size=128)
    add("gptqmodel-int4-channel-v1", gptq(1), rule="gptq", num_bits=4)
    add("gptqmodel-int8-g32-v1", gptq(1), rule="gptq", group_size=32)
    add("gptqmodel-int8-g128-v2", gptq(2), rule="gptq", group_size=128)
    return found


def cases() -> list[tuple[Golden, str]]:
    """Every matrix of every file."""
    listed = []
    for golden in goldens():
        names = load_file(MATRICES / f"{golden.file}.safetensors")
        listed += [(golden, module) for module in sorted({name.partition(".")[0] for name in names})]
    return listed


def comparable(golden: Golden, weight: np.ndarray, wanted: Quantized) -> np.ndarray:
    """Rows of which we want what the tool wrote.

    GPTQModel gives a symmetric group without a negative weight half the scale it needs, so that it clips; we do not.
    """
    keep = np.isfinite(wanted.scale).all(axis=1)
    if golden.scheme.rule == "gptq" and golden.scheme.symmetric:
        groups = weight.astype(np.float32).reshape(len(weight), golden.scheme.groups(weight.shape[1]), -1)
        keep &= ((groups.min(axis=2) < 0) | (groups.max(axis=2) == 0)).all(axis=1)
    return keep if golden.scheme.block is None else np.ones(len(weight), bool)


@pytest.mark.parametrize("backend_name", ["fast", "torch"])
@pytest.mark.parametrize(("golden", "module"), [pytest.param(*c, id=f"{c[0].file}-{c[1]}") for c in cases()])
def test_codes_and_scales_are_those_of_the_tool(golden: Golden, module: str, backend_name: str) -> None:
    weight = sources()[module]
    if golden.scheme.group_size > 0 and weight.shape[1] % golden.scheme.group_size:
        pytest.skip("the tool pads rows to whole groups")
    stored = load_file(MATRICES / f"{golden.file}.safetensors")
    tensors = {name.partition(".")[2]: array for name, array in stored.items() if name.startswith(f"{module}.")}
    wanted = golden.read(tensors, weight, golden.scheme)
    backend = choose_backend(backend_name, golden.scheme, dtype_of(weight))
    if not np.isfinite(wanted.scale).all():
        with pytest.raises(NumericError, match="overflow"):
            backend.quantize(weight, golden.scheme)
    rows = comparable(golden, weight, wanted)
    assert rows.sum() > len(rows) // 4
    amax = float(np.abs(weight.astype(np.float32)).max())
    made = backend.quantize(weight[rows], golden.scheme, global_amax=amax)
    scales = slice(None) if golden.scheme.block else rows
    np.testing.assert_array_equal(made.scale, wanted.scale[scales])
    if wanted.zero_point is not None:
        np.testing.assert_array_equal(made.zero_point, wanted.zero_point[rows])
    if wanted.global_scale is not None:
        np.testing.assert_array_equal(made.global_scale, wanted.global_scale)
    np.testing.assert_array_equal(made.codes.view(np.uint8), wanted.codes.view(np.uint8)[rows])

"""Tensors that the reference tools made, as oracles for packing and unpacking.

Inherit ``GoldenContract`` and list ``GOLDENS``. Codes and scales are the tool's own, so nothing here depends on how
weights are rounded: what a format unpacks it must pack again to the same bytes, and it must mean the source matrix.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pytest

from tensorsurgeon.errors import NumericError
from tensorsurgeon.formats.base import Format
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F8_E4M3, dtype_named, dtype_of
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

FOLDER = Path(__file__).parents[2] / "fixtures" / "golden"
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


class Golden(NamedTuple):
    """A file of matrices and how to read it.

    ``extra``: tensors in it that the format does not write. ``refused_by_check``: matrices of shapes or schemes that
    we do not write but read. ``overflown``: matrices in which the tool stored an infinite scale. ``unlike``: matrices
    with rows that the tool itself gets wrong (its rule for groups without a sign change, say), so that only bytes
    can be compared.
    """

    file: str
    layout: Format
    scheme: Scheme
    extra: tuple[str, ...] = ()
    refused_by_check: tuple[str, ...] = ()
    not_packed: tuple[str, ...] = ()
    overflown: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()


def header(path: Path) -> dict[str, TensorSpec]:
    with path.open("rb") as file:
        entries = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    entries.pop("__metadata__", None)
    return {n: TensorSpec(n, dtype_named(e["dtype"]), tuple(e["shape"])) for n, e in entries.items()}


def matrices(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Arrays by module and local name."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8:start])
    entries.pop("__metadata__", None)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, entry in entries.items():
        module, _, local = name.rpartition(".")
        begin, end = (start + offset for offset in entry["data_offsets"])
        array = np.frombuffer(data[begin:end], dtype_named(entry["dtype"]).numpy).reshape(entry["shape"])
        found.setdefault(module, {})[local] = array
    return found


def checkpoint(folder: Path) -> tuple[dict[str, object], SpecMap]:
    """config.json and the specs of every shard."""
    config = json.loads((folder / "config.json").read_text())
    specs = SpecMap((), config)
    for shard in sorted(folder.glob("*.safetensors")):
        specs.update(header(shard))
    return config, specs


def dequantized(quantized: Quantized, scheme: Scheme) -> np.ndarray:
    """The slow, plain meaning of codes and scales, written apart from the package."""
    codes, scale = quantized.codes, quantized.scale
    if scheme.type in ("nvfp4", "mxfp4"):
        values = np.where(codes & 8, -1, 1) * _E2M1[codes & 7]
        if quantized.global_scale is not None:
            scale = scale / quantized.global_scale
    else:
        values = codes.astype(np.float32)
    rows, columns = codes.shape
    repeat = (1, columns // scale.shape[1]) if scheme.block is None else scheme.block

    def spread(array: np.ndarray) -> np.ndarray:
        return np.repeat(np.repeat(array, repeat[0], 0), repeat[1], 1)[:rows, :columns]

    if quantized.zero_point is not None:
        values = values - spread(quantized.zero_point.astype(np.float32))
    return values * spread(scale)


def step_sizes(quantized: Quantized, scheme: Scheme) -> np.ndarray:
    """How far a rounded weight may be from its source, elementwise."""
    ones = np.full(quantized.codes.shape, 2, np.uint8) if scheme.type.endswith("fp4") else None
    codes = ones if ones is not None else np.ones(quantized.codes.shape, np.float32)
    return np.abs(dequantized(Quantized(codes, quantized.scale, None, quantized.global_scale), scheme))


class GoldenContract:
    """Every matrix of every file in ``GOLDENS``."""

    GOLDENS: ClassVar[tuple[Golden, ...]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize("golden", self.GOLDENS, ids=[golden.file for golden in self.GOLDENS])

    def test_repacked_bytes_equal_the_tools_own(self, golden: Golden) -> None:
        modules = matrices(FOLDER / "matrices" / f"{golden.file}.safetensors")
        sources = matrices(FOLDER / "matrices" / "source.safetensors")
        compared = 0
        for module, arrays in modules.items():
            if module in golden.not_packed:
                continue
            source = sources[module]["weight"]
            weight = TensorSpec(f"{module}.weight", dtype_of(source), source.shape)
            scale = next(arrays[name] for name in ("weight_scale", "scales", "weight_scale_inv") if name in arrays)
            scheme = golden.scheme
            if scheme.type != "mxfp4":
                scheme = golden.layout.resolve_scheme(scheme, dtype_of(scale) if scale.dtype != np.uint8 else F8_E4M3)
                scheme = _with(scheme, scale)
            else:
                scheme = golden.layout.resolve_scheme(scheme, weight.dtype)
            if module not in golden.refused_by_check:
                golden.layout.check(weight, golden.scheme)
            quantized = golden.layout.unpack(arrays, scheme)
            planned = golden.layout.tensors(weight, scheme)
            if module in golden.overflown:
                with pytest.raises(NumericError, match=r"scale -?inf is not finite"):
                    golden.layout.pack(quantized, scheme)
                continue
            assert {spec.name for spec in planned} == set(arrays) - set(golden.extra), module
            assert golden.layout.weight_shape(_specs(arrays), scheme) == source.shape, module
            for spec, array in zip(planned, golden.layout.pack(quantized, scheme), strict=True):
                found = arrays[spec.name]
                assert (dtype_of(found), found.shape) == (spec.dtype, spec.shape), (module, spec.name)
                assert array.tobytes() == found.tobytes(), (module, spec.name)
                compared += 1
        assert compared

    def test_unpacked_codes_mean_the_source_matrix(self, golden: Golden) -> None:
        modules = matrices(FOLDER / "matrices" / f"{golden.file}.safetensors")
        sources = matrices(FOLDER / "matrices" / "source.safetensors")
        compared = 0
        for module, arrays in modules.items():
            if module in (*golden.not_packed, *golden.overflown, *golden.unlike):
                continue
            compared += 1
            source = sources[module]["weight"].astype(np.float32)
            quantized = golden.layout.unpack(arrays, golden.scheme)
            error = np.abs(dequantized(quantized, golden.scheme) - source)
            # Half a step, half of another where the top code is clipped, and what BF16 scales add.
            allowed = step_sizes(quantized, golden.scheme) * 1.02
            if golden.scheme.type == "fp8":
                allowed = np.abs(source) / 8 + allowed / 64
            assert (error <= allowed + 1e-6).all(), (module, float((error - allowed).max()))
        assert compared or golden.unlike


def _with(scheme: Scheme, scale: np.ndarray) -> Scheme:
    from dataclasses import replace

    return replace(scheme, scale_dtype=dtype_of(scale))


def _specs(arrays: dict[str, np.ndarray]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, dtype_of(array), array.shape) for name, array in arrays.items()}


def read_golden(folder: str) -> tuple[Format | None, dict[str, Scheme], SpecMap]:
    """A whole checkpoint a tool made: the format found, and its modules as the config describes them."""
    from tensorsurgeon.formats.registry import detect, quantization_config

    config, specs = checkpoint(FOLDER / "models" / folder)
    layout = detect(config, specs)
    if layout is None:
        return None, {}, specs
    found = quantization_config(config)
    assert found is not None
    return layout, layout.read_config(found, specs), specs

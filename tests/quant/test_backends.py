"""One contract, two backends: every scheme on ordinary and edge matrices gives the same bits in numba and in torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from tensorsurgeon.errors import NumericError, RecipeError, SpecError
from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.quant.rtn.fast import FastBackend
from tensorsurgeon.quant.rtn.fp4 import amax_of
from tensorsurgeon.quant.rtn.plain_torch import TorchBackend
from tensorsurgeon.quant.scheme import RULES, Quantized, Rule, Scheme
from tensorsurgeon.tensors.arrays import workspace_of_thread
from tensorsurgeon.tensors.dtypes import BF16, F16, F32, I32, DType

FAST, TORCH = FastBackend(), TorchBackend()
DTYPES = (BF16, F16, F32)
FLOATS = (
    Scheme(type="fp8"),
    Scheme(type="fp8", group_size=128),
    Scheme(type="fp8", block=(128, 128)),
    Scheme(type="fp8", block=(128, 128), scale_dtype=F32),
    Scheme(type="nvfp4", num_bits=4, group_size=16),
    Scheme(type="mxfp4", num_bits=4, group_size=32),
)


def integer_schemes() -> list[Scheme]:
    schemes = [
        Scheme(num_bits=num_bits, group_size=group_size, rule=rule, symmetric=symmetric)
        for rule in RULES
        for num_bits, group_size in ((8, -1), (4, 32), (4, 128), (3, 16), (2, 64), (5, -1), (6, 24), (7, 8))
        for symmetric in (True, False)
    ]
    schemes += [replace(s, signed=s.rule not in ("autoround", "awq")) for s in schemes if s.symmetric]
    more = [replace(schemes[0], scale_dtype=dtype) for dtype in DTYPES]
    more += [Scheme(num_bits=4, group_size=32, rule=rule, scale_dtype=dtype) for rule in RULES for dtype in DTYPES]
    return schemes + more


def matrix(seed: int = 0, rows: int = 40, columns: int = 384) -> np.ndarray:
    """Ordinary rows, then zeros, constants, outliers, one-sided rows, ties, and every size of number F32 has."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32)
    steps = np.arange(columns)
    weight[0] = 0
    weight[1] = -0.0
    weight[2, : columns // 2] = 0
    weight[3], weight[4] = 0.03, -0.03
    weight[5, 7], weight[6, 11] = 100, -100
    weight[7] = np.abs(weight[7]) + 0.001
    weight[8] = -np.abs(weight[8]) - 0.001
    weight[9] = (steps % 31) * 0.5 - 7.5
    weight[10] = (steps % 256) - 127.5
    weight[11] = ((steps % 31) * 0.5 - 8) * 2.0**-9
    weight[12] = (steps % 31) * 0.5 - 0.5
    weight[13] = np.where(steps % 2 == 0, 0.5, -0.5)
    weight[14] = steps % 15 - 6.0
    for row, size in enumerate((1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 1e-30, 1e-37, 1e-39, 1e-44, 1e3, 1e4)):
        weight[15 + row] *= size / 0.02
    weight[27] = np.exp2(steps % 40 - 24.0) * np.where(steps % 3, 1, -1)
    return weight


def in_dtype(weight: np.ndarray, dtype: DType) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.clip(weight, -30000, 30000).astype(dtype.numpy) if dtype is F16 else weight.astype(dtype.numpy)


def assert_same_bits(made: Quantized, wanted: Quantized) -> None:
    for name, ours, theirs in zip(Quantized._fields, made, wanted, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None and theirs is not None:
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
            np.testing.assert_array_equal(np.atleast_1d(ours).view(np.uint8), np.atleast_1d(theirs).view(np.uint8), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [*integer_schemes(), *FLOATS], ids=lambda s: (
    f"{s.rule}-{s.type}{s.num_bits}-g{s.group_size}{'' if s.symmetric else '-asym'}"
    f"{'' if s.signed is None else f'-signed={s.signed}'}{s.block or ''}{s.scale_dtype or ''}"
))  # fmt: skip
def test_both_backends_give_the_same_bits(scheme: Scheme, dtype: DType) -> None:
    weight = in_dtype(matrix(), dtype)
    assert FAST.serves(scheme, dtype)
    assert TORCH.serves(scheme, dtype)
    wanted = TORCH.quantize(weight, scheme)
    made = FAST.quantize(weight, scheme)
    assert_same_bits(made, wanted)
    rows, columns = weight.shape
    assert made.codes.shape == (rows, columns)
    if scheme.type == "int":
        assert made.codes.dtype == np.int8
        assert made.codes.min() >= scheme.qmin
        assert made.codes.max() <= scheme.qmax
        assert made.scale.shape == (rows, scheme.groups(columns))
        assert (made.zero_point is None) == scheme.symmetric
    back = FAST.dequantize(made, scheme, dtype)
    assert back.dtype == dtype.numpy
    np.testing.assert_array_equal(back.view(np.uint8), TORCH.dequantize(wanted, scheme, dtype).view(np.uint8))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_signed_scales_map_the_extreme_of_each_group_to_the_lowest_code(rule: Rule, num_bits: int) -> None:
    weight = np.random.default_rng(4).standard_normal((64, 256)).astype(np.float32)
    scheme = Scheme(rule=rule, num_bits=num_bits, group_size=32, scale_dtype=F32, signed=True)
    made = FAST.quantize(weight, scheme)
    groups, codes = weight.reshape(64, 8, 32), made.codes.reshape(64, 8, 32)
    extreme = np.abs(groups).argmax(2)[..., None]
    led_by = np.take_along_axis(groups, extreme, 2)
    assert (np.take_along_axis(codes, extreme, 2) == scheme.qmin).all()
    assert (np.sign(made.scale) == -np.sign(led_by[..., 0])).all()
    assert 0.3 < (made.scale < 0).mean() < 0.7
    np.testing.assert_allclose(np.abs(made.scale), np.abs(led_by[..., 0]) / 2 ** (num_bits - 1), rtol=1e-6)
    off = np.abs(groups - codes * made.scale[..., None]).max(2) / np.abs(made.scale)
    # What lies beyond the highest code is clipped by at most one step.
    assert off.max() <= 1.0 + 1e-4
    plain = FAST.quantize(weight, replace(scheme, signed=False))
    assert (plain.scale > 0).all()
    error = [np.square(weight - FAST.dequantize(q, scheme, F32)).sum() for q in (made, plain)]
    assert error[0] < error[1] or num_bits == 8


numbers = st.floats(-(2.0**15), 2.0**15, width=16) | st.floats(-1.0, 1.0, width=32)


@given(
    st.lists(numbers, min_size=32, max_size=32),
    st.sampled_from(RULES),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([None, True, False]),
    st.sampled_from(DTYPES),
    st.sampled_from([-1, 16, 32]),
)
@settings(max_examples=300, deadline=None)
def test_both_backends_agree_on_any_numbers(
    values: list[float], rule: str, num_bits: int, symmetric: bool, signed: bool | None, dtype: DType, size: int
) -> None:
    scheme = Scheme(rule=rule, num_bits=num_bits, symmetric=symmetric, signed=signed, group_size=size)  # type: ignore[arg-type]
    weight = in_dtype(np.array([values, values[::-1]], np.float32), dtype)
    assert_same_bits(FAST.quantize(weight, scheme), TORCH.quantize(weight, scheme))


@given(st.lists(numbers, min_size=64, max_size=64), st.sampled_from(FLOATS), st.sampled_from(DTYPES))
@settings(max_examples=150, deadline=None)
def test_both_backends_agree_on_any_numbers_as_floats(values: list[float], scheme: Scheme, dtype: DType) -> None:
    weight = in_dtype(np.array([values * 2], np.float32), dtype)
    assert_same_bits(FAST.quantize(weight, scheme), TORCH.quantize(weight, scheme))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_sixteen_bit_number_survives_widening(dtype: DType) -> None:
    """Eight rows that hold every finite 16-bit pattern, by schemes that show each bit of the quotient."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    patterns = bits.astype(np.uint16).view(dtype.numpy) if dtype is not F32 else (bits << 16).view(np.float32)
    finite = patterns[np.isfinite(patterns.astype(np.float32))]
    order = np.argsort(np.abs(finite.astype(np.float32)), kind="stable")
    weight = np.ascontiguousarray(finite[order][: len(order) // 128 * 128].reshape(-1, 128))
    for scheme in (Scheme(), Scheme(rule="gptq", scale_dtype=F32, group_size=32), FLOATS[0], FLOATS[4], FLOATS[5]):
        ours = weight if scheme.rule != "gptq" else weight[np.abs(weight.astype(np.float32)).max(axis=1) < 1e38]
        assert_same_bits(FAST.quantize(ours, scheme), TORCH.quantize(ours, scheme))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (130, 130), (20, 160), (257, 33)])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(rule="quark", symmetric=False), FLOATS[0], FLOATS[2]], ids=str)
def test_odd_shapes_and_partial_blocks(shape: tuple[int, int], scheme: Scheme) -> None:
    weight = np.random.default_rng(3).standard_normal(shape).astype(BF16.numpy)
    assert_same_bits(FAST.quantize(weight, scheme), TORCH.quantize(weight, scheme))


def test_worked_vector_of_the_formats_document() -> None:
    weight = np.array([[0.9, -1.5, 0.2, -0.05, 0.7, 0.3, -0.1, 1.2]], np.float32)
    int4 = FAST.quantize(weight, Scheme(num_bits=4))
    assert int4.codes.tolist() == [[4, -8, 1, 0, 4, 2, 0, 6]]
    assert int4.scale[0, 0] == np.float32(0.2)
    assert FAST.quantize(weight.astype(BF16.numpy), Scheme(num_bits=4)).scale[0, 0] == np.float32(0.20019531)
    asymmetric = FAST.quantize(weight, Scheme(num_bits=4, symmetric=False))
    assert asymmetric.codes.tolist() == [[5, -8, 1, 0, 4, 2, -1, 7]]
    assert asymmetric.zero_point is not None
    assert asymmetric.zero_point.tolist() == [[0]]
    assert FAST.quantize(weight, Scheme()).codes.tolist() == [[76, -128, 17, -4, 59, 26, -8, 102]]
    fp8 = FAST.quantize(weight, FLOATS[0])
    assert fp8.codes.astype(np.float32).tolist() == [[256, -448, 60, -15, 208, 88, -30, 352]]


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quark_in_f32_is_the_observer_of_torch(group_size: int, symmetric: bool) -> None:
    weight = matrix(5)
    made = FAST.quantize(weight, Scheme(rule="quark", group_size=group_size, symmetric=symmetric))
    groups = torch.from_numpy(weight).view(-1, weight.shape[1] if group_size == -1 else group_size)
    qscheme = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
    observer = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.qint8, qscheme=qscheme)
    scale, zero_point = (observer(groups), observer.calculate_qparams())[1]
    np.testing.assert_array_equal(made.scale.ravel(), scale.numpy())
    if made.zero_point is not None:
        np.testing.assert_array_equal(made.zero_point.ravel(), zero_point.numpy())
    rounded = torch.fake_quantize_per_channel_affine(groups, scale, zero_point.int(), 0, -128, 127)
    back = FAST.dequantize(made, Scheme(group_size=group_size), F32)
    np.testing.assert_array_equal(back.reshape(rounded.shape), rounded.numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compressed_tensors_scales_are_the_observers_rounded(dtype: DType) -> None:
    """In F32 the rule is the observer's but for groups of zeros and its epsilon; in 16 bits, its rounding."""
    weight = in_dtype(matrix(6)[9:13], dtype)
    observer = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    observer(torch.from_numpy(weight.astype(np.float32)))
    scale = observer.calculate_qparams()[0].numpy()
    made = FAST.quantize(weight, Scheme())
    np.testing.assert_array_equal(made.scale[:, 0], scale.astype(dtype.numpy).astype(np.float32))


def test_global_scale_comes_from_the_observer_of_the_whole_tensor_or_from_siblings() -> None:
    weight = matrix(7)
    observer = MinMaxObserver()
    observer(torch.from_numpy(weight))
    amax = max(-float(observer.min_val), float(observer.max_val))
    assert amax_of(torch.from_numpy(weight)) == amax
    scheme = FLOATS[4]
    whole = FAST.quantize(weight, scheme)
    parts = [FAST.quantize(part, scheme, global_amax=amax) for part in (weight[:16], weight[16:])]
    np.testing.assert_array_equal(np.vstack([p.codes for p in parts]), whole.codes)
    np.testing.assert_array_equal(np.vstack([p.scale for p in parts]), whole.scale)
    shared = TORCH.quantize(weight[:16], scheme, global_amax=3 * amax)
    assert_same_bits(FAST.quantize(weight[:16], scheme, global_amax=3 * amax), shared)


@pytest.mark.parametrize("backend", [FAST, TORCH], ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(num_bits=4, group_size=32, symmetric=False), *FLOATS[2:]], ids=str)
def test_nonfinite_weights_are_refused_with_their_place(
    backend: FastBackend | TorchBackend, dtype: DType, value: float, scheme: Scheme
) -> None:
    weight = matrix(8).astype(dtype.numpy) if dtype is not F16 else in_dtype(matrix(8), F16)
    weight[31, 200] = value
    weight[39, 3] = np.nan
    with pytest.raises(NumericError, match=r"^2 of 15360 weights are not finite, the first at row 31, column 200"):
        backend.quantize(weight, scheme)


@pytest.mark.parametrize("backend", [FAST, TORCH], ids=lambda b: b.name)
def test_scales_that_overflow_are_refused_with_their_place(backend: FastBackend | TorchBackend) -> None:
    weight = matrix(9)
    weight[30, 100] = 1e6
    with pytest.raises(NumericError, match=r"^1 of 480 scales overflow F16, the first at row 30, group 3"):
        backend.quantize(weight, Scheme(rule="gptq", num_bits=4, group_size=32))


@pytest.mark.parametrize("backend", [FAST, TORCH], ids=lambda b: b.name)
def test_groups_that_do_not_fit_are_refused(backend: FastBackend | TorchBackend) -> None:
    with pytest.raises(SpecError, match="group_size 100 does not divide in_features 384"):
        backend.quantize(matrix(), Scheme(group_size=100))
    with pytest.raises(SpecError, match="a linear weight"):
        backend.quantize(matrix().reshape(8, -1, 384), Scheme())


def test_choice_of_backend() -> None:
    assert choose_backend("auto", Scheme(), BF16).name == "fast"
    assert choose_backend("torch", Scheme(), BF16).name == "torch"
    with pytest.raises(RecipeError, match="did you mean 'torch'"):
        choose_backend("toch", Scheme(), BF16)
    with pytest.raises(SpecError, match="cannot quantize I32"):
        choose_backend("auto", Scheme(), I32)
    with pytest.raises(SpecError, match="cannot quantize BF16"):
        choose_backend("auto", Scheme(type="fp8", rule="gptq"), BF16)


def test_views_and_read_only_memory_are_taken_as_they_are() -> None:
    weight = matrix().astype(BF16.numpy)
    wanted = FAST.quantize(np.ascontiguousarray(weight[::2, ::-1]), Scheme())
    assert_same_bits(FAST.quantize(weight[::2, ::-1], Scheme()), wanted)
    raw = b"." + weight.tobytes()
    unaligned = np.frombuffer(raw, np.uint8)[1:].view(BF16.numpy).reshape(weight.shape)
    assert not unaligned.flags.aligned
    for backend in (FAST, TORCH):
        assert_same_bits(backend.quantize(unaligned, Scheme()), FAST.quantize(weight, Scheme()))


def test_threads_with_their_own_workspaces_agree() -> None:
    weights = [matrix(seed).astype(BF16.numpy) for seed in range(8)]
    scheme = Scheme(num_bits=4, group_size=128)

    def run(weight: np.ndarray) -> Quantized:
        with workspace_of_thread():
            made = FAST.quantize(weight, scheme)
            return Quantized(made.codes.copy(), made.scale.copy())

    with ThreadPoolExecutor(4) as pool:
        for weight, made in zip(weights, pool.map(run, weights), strict=True):
            assert_same_bits(made, TORCH.quantize(weight, scheme))


SCRIPT = """
import json, sys, numpy as np
import tensorsurgeon.quant.rtn.backend, tensorsurgeon.quant.bitpack, tensorsurgeon.quant.rtn.fast
from tensorsurgeon.tensors.dtypes import F32
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.quant.rtn.backend import choose_backend
codes = choose_backend("auto", Scheme(), F32).quantize(np.eye(4, dtype=np.float32), Scheme()).codes
print(json.dumps({"codes": codes.tolist(), "torch": "torch" in sys.modules}))
"""


def test_the_fast_backend_needs_no_torch() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout) == {"codes": (127 * np.eye(4, dtype=int)).tolist(), "torch": False}

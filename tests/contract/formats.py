"""What every format promises; inherit ``FormatContract`` and give it ``CASES``.

class TestGptq(FormatContract):
    CASES = (Case(Gptq(), Scheme(num_bits=4, group_size=32), rows=32, columns=32), ...)
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorsurgeon.errors import ConfigError, NumericError, RecipeError, SpecError
from tensorsurgeon.formats.base import Format, QuantizedModel
from tensorsurgeon.formats.registry import detect, format_class
from tensorsurgeon.models.experts import experts_of
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import BF16, F8_E4M3, F8_E8M0, F16, F32, DType, dtype_of
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec
from tests.contract.written_models import language_linears, qwen_weights, under, written


class Case(NamedTuple):
    """A scheme that a format holds, and what outputs and inputs must be multiples of."""

    layout: Format
    scheme: Scheme
    rows: int = 1
    columns: int = 1
    weight_dtype: DType = BF16


class Refusal(NamedTuple):
    """A weight or scheme that ``check`` refuses, and what the message must say."""

    layout: Format
    weight: TensorSpec
    scheme: Scheme
    message: str


class Mutation(NamedTuple):
    """A change to a written config that ``read_config`` must refuse, naming the key."""

    path: tuple[str, ...]
    value: Any
    message: str


def random_quantized(scheme: Scheme, rows: int, columns: int, seed: int) -> Quantized:
    """Codes of every value and scales that the stored dtype holds, negative ones too for AutoRound."""
    rng = np.random.default_rng(seed)
    groups = scheme.groups(columns)
    shape = (rows, groups) if scheme.block is None else (-(-rows // scheme.block[0]), -(-columns // scheme.block[1]))
    scale = rng.uniform(0.01, 4.0, shape).astype(np.float32)
    if scheme.rule == "autoround":
        scale *= rng.choice(np.array([-1, 1], np.float32), shape)
    assert scheme.scale_dtype is not None
    scale = scale.astype(scheme.scale_dtype.numpy).astype(np.float32)
    if scheme.type == "fp8":
        codes = rng.standard_normal((rows, columns)).astype(ml_dtypes.float8_e4m3fn)
        return Quantized(codes, scale)
    if scheme.type in ("nvfp4", "mxfp4"):
        codes = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
        return Quantized(codes, scale, global_scale=np.array([1792.0], np.float32) if scheme.type == "nvfp4" else None)
    codes = rng.integers(scheme.qmin, scheme.qmax + 1, (rows, columns)).astype(np.int8)
    zero_point = None
    if not scheme.symmetric:
        zero_point = rng.integers(scheme.qmin, scheme.qmax + 1, shape).astype(np.int8)
    return Quantized(codes, scale, zero_point)


def assert_same(found: Quantized, wanted: Quantized) -> None:
    """Equal to the bit, signs of zeros included."""
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) is (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            assert one.tobytes() == other.tobytes()


def resolved(case: Case) -> Scheme:
    return case.layout.resolve_scheme(case.scheme, case.weight_dtype)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    return draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 2**32 - 1))


class FormatContract:
    """Tests that hold for every format; each runs over all of ``CASES``."""

    CASES: ClassVar[tuple[Case, ...]]
    REFUSALS: ClassVar[tuple[Refusal, ...]] = ()
    MUTATIONS: ClassVar[tuple[Mutation, ...]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for fixture, values in (("case", self.CASES), ("refusal", self.REFUSALS), ("mutation", self.MUTATIONS)):
            if fixture in metafunc.fixturenames:
                metafunc.parametrize(fixture, values, ids=range(len(values)))

    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(size=sizes())
    def test_unpack_restores_what_was_packed_and_planned(self, case: Case, size: tuple[int, int, int]) -> None:
        scheme = resolved(case)
        step = max(1, scheme.group_size)
        rows, columns = size[0] * case.rows, size[1] * int(np.lcm(case.columns, step))
        weight = TensorSpec("a.b.weight", case.weight_dtype, (rows, columns))
        case.layout.check(weight, scheme)
        quantized = random_quantized(scheme, rows, columns, size[2])
        planned = case.layout.tensors(weight, scheme)
        packed = case.layout.pack(quantized, scheme)
        assert [(s.dtype, s.shape) for s in planned] == [(dtype_of(a), a.shape) for a in packed]
        assert all(array.flags.c_contiguous for array in packed)
        assert case.layout.local_names(scheme) == tuple(spec.name for spec in planned)
        arrays = {spec.name: array for spec, array in zip(planned, packed, strict=True)}
        assert_same(case.layout.unpack(arrays, scheme), quantized)
        full = case.columns % 32 == 0 or scheme.group_size != -1 or columns % 32 == 0 or scheme.type != "int"
        if full:
            assert case.layout.weight_shape({s.name: s for s in planned}, scheme) == (rows, columns)

    def test_packing_leaves_its_input_alone(self, case: Case) -> None:
        scheme = resolved(case)
        quantized = random_quantized(scheme, 64, max(64, scheme.group_size), 5)
        before = [None if part is None else part.copy() for part in quantized]
        case.layout.pack(quantized, scheme)
        for part, copy in zip(quantized, before, strict=True):
            assert part is copy is None or (part is not None and copy is not None and part.tobytes() == copy.tobytes())

    def test_rows_packed_in_pieces_are_rows_packed_at_once(self, case: Case) -> None:
        scheme = resolved(case)
        if not case.layout.can_chunk_rows(scheme):
            planned = case.layout.tensors(TensorSpec("a.weight", case.weight_dtype, (256, 256)), scheme)
            assert any(spec.shape[0] != 256 or spec.name == "weight_shape" for spec in planned)
            return
        quantized = random_quantized(scheme, 64, 256, 3)
        whole = case.layout.pack(quantized, scheme)
        parts = [
            case.layout.pack(quantized._replace(codes=quantized.codes[start:stop], scale=quantized.scale[start:stop]), scheme)
            for start, stop in ((0, 24), (24, 64))
        ]
        for array, *pieces in zip(whole, *parts, strict=True):
            assert np.concatenate(pieces).tobytes() == array.tobytes()

    def test_config_names_the_same_modules_and_schemes_when_it_is_read_back(self, case: Case) -> None:
        scheme = resolved(case)
        model = written(case.layout, under(scheme))
        files = case.layout.config_files(model)
        read = case.layout.read_config(json.loads(json.dumps(files.quantization_config)), model.specs)
        default = case.layout.default_scheme()
        as_read = replace(scheme, rule=default.rule, clip_search=False)
        assert list(read) == list(model.modules)
        assert set(read.values()) == {as_read}
        assert all(content == files.quantization_config for content in files.extra_files.values())

    def test_format_is_detected_from_its_own_config(self, case: Case) -> None:
        model = written(case.layout, under(resolved(case)))
        config = case.layout.config_files(model).quantization_config
        assert detect({"quantization_config": config}, model.specs) == case.layout

    def test_no_list_of_experts_in_the_config(self, case: Case) -> None:
        scheme = resolved(case)
        weights = qwen_weights(layers=4, experts=40, fused=())
        model = written(case.layout, under(scheme), weights)
        text = json.dumps(case.layout.config_files(model).quantization_config)
        assert "experts.7." not in text
        assert "experts.39" not in text

    def test_config_with_experts_left_float(self, case: Case) -> None:
        scheme = resolved(case)
        for fused in (("mtp",), ("mtp", "model")):

            def attention_only(module: str) -> Scheme | None:
                return scheme if language_linears(module) and experts_of(module) is None else None

            model = written(case.layout, attention_only, qwen_weights(fused=fused))
            config = case.layout.config_files(model).quantization_config
            assert set(case.layout.read_config(config, model.specs)) == set(model.modules)

    def test_some_fused_siblings_quantized_is_refused(self, case: Case) -> None:
        scheme = resolved(case)
        for left, other in (
            (r"layers\.3\.self_attn\.k_proj$", "q_proj"),
            (r"layers\.1\.linear_attn\.in_proj_z$", "in_proj_qkv"),
            (r"shared_expert\.up_proj$", "gate_proj"),
            (r"layers\.2\.mlp\.experts\.1\.down_proj$", "experts"),
        ):
            import re

            def partial(module: str, left: str = left) -> Scheme | None:
                return scheme if language_linears(module) and not re.search(left, module) else None

            model = written(case.layout, partial)
            with pytest.raises(SpecError, match=other) as caught:
                case.layout.config_files(model)
            assert re.search(left.removesuffix("$"), str(caught.value))

    def test_a_scale_that_cannot_be_stored_is_refused(self, case: Case) -> None:
        scheme = resolved(case)
        quantized = random_quantized(scheme, 64, max(64, scheme.group_size), 1)
        broken = quantized.scale.copy()
        bad = [np.nan, np.inf]
        bad += {F16: [7e4, 1e-9, 0.1], BF16: [0.1], F32: [], F8_E4M3: [1e3, 1e-5], F8_E8M0: [3.0]}[scheme.scale_dtype]
        for value in bad:
            broken.flat[0] = value
            with pytest.raises(NumericError, match="scale"):
                case.layout.pack(quantized._replace(scale=broken), scheme)

    def test_negative_scales_survive(self, case: Case) -> None:
        scheme = resolved(case)
        if scheme.scale_dtype is F8_E8M0:
            pytest.skip("powers of two have no sign")
        quantized = random_quantized(scheme, 64, max(64, scheme.group_size), 2)
        quantized = quantized._replace(scale=-np.abs(quantized.scale))
        weight = TensorSpec("a.weight", case.weight_dtype, quantized.codes.shape)
        names = [spec.name for spec in case.layout.tensors(weight, scheme)]
        arrays = dict(zip(names, case.layout.pack(quantized, scheme), strict=True))
        assert_same(case.layout.unpack(arrays, scheme), quantized)

    def test_unknown_option_is_refused(self, case: Case) -> None:
        model = written(case.layout, under(resolved(case)))
        for options in ({"activation": "none"}, {"activations": ["static"]}, {"activations": ["dynamic", "none"]}):
            wrong = QuantizedModel(modules=model.modules, unquantized=model.unquantized, specs=model.specs, options=options)
            with pytest.raises(RecipeError):
                case.layout.config_files(wrong)

    def test_nothing_quantized_is_refused(self, case: Case) -> None:
        with pytest.raises(SpecError, match="no module is quantized"):
            case.layout.config_files(QuantizedModel(modules={}, unquantized=(), specs=SpecMap()))

    def test_a_module_stored_float_that_the_config_quantizes_is_refused(self, case: Case) -> None:
        model = written(case.layout, under(resolved(case)))
        config = case.layout.config_files(model).quantization_config
        specs = SpecMap(model.specs.values())
        module = "model.language_model.layers.0.linear_attn.out_proj"
        for name in [name for name in specs if name.startswith(module)]:
            del specs[name]
        specs[f"{module}.weight"] = TensorSpec(f"{module}.weight", BF16, (256, 256))
        if case.layout.quant_method == "gptq":
            assert module not in case.layout.read_config(config, specs)
            return
        with pytest.raises(ConfigError, match=module):
            case.layout.read_config(config, specs)

    def test_class_is_registered(self, case: Case) -> None:
        assert format_class(case.layout.name) is type(case.layout)

    def test_check_refuses(self, refusal: Refusal) -> None:
        with pytest.raises(SpecError, match=refusal.message) as caught:
            refusal.layout.check(refusal.weight, refusal.scheme)
        assert refusal.weight.name in str(caught.value)

    def test_read_config_refuses(self, mutation: Mutation) -> None:
        case = self.CASES[0]
        model = written(case.layout, under(resolved(case)))
        config = json.loads(json.dumps(case.layout.config_files(model).quantization_config))
        place = config
        for key in mutation.path[:-1]:
            place = place[key]
        if mutation.value is None:
            del place[mutation.path[-1]]
        else:
            place[mutation.path[-1]] = mutation.value
        with pytest.raises(ConfigError, match=mutation.message):
            case.layout.read_config(config, model.specs)

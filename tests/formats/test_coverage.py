from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from tensorsurgeon.errors import RecipeError, SpecError
from tensorsurgeon.formats.coverage import cover
from tensorsurgeon.formats.ct_int import CtInt
from tensorsurgeon.formats.ct_packed import CtPacked
from tensorsurgeon.formats.quark_int8 import QuarkInt8
from tensorsurgeon.formats.registry import FORMATS, format_class
from tensorsurgeon.models.patterns import exact_pattern, patterns_for
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16
from tensorsurgeon.tensors.spec import TensorSpec
from tests.contract.written_models import language_linears, qwen_weights, under, written

PACKED = CtPacked()
FOUR, EIGHT = (Scheme(num_bits=bits, group_size=32, scale_dtype=BF16) for bits in (4, 8))


@pytest.mark.parametrize("name", FORMATS)
def test_registry_names_a_class_with_that_name_but_for_variants(name):
    entry = FORMATS[name]
    assert format_class(name).quant_method == entry.quant_method
    assert (format_class(name).name == name) is (not entry.settings or name == "quark-int4")


def test_unknown_format_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match="unknown format 'gtpq'; did you mean 'gptq'"):
        format_class("gtpq")


def test_no_format_imports_torch_or_numba_while_planning():
    code = (
        "import sys; from tensorsurgeon.formats.registry import FORMATS, format_class;"
        "[format_class(n)().default_scheme() for n in FORMATS];"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numba')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_experts_are_folded_and_a_float_mtp_head_is_apart():
    coverage = cover(written(PACKED, under(FOUR)))
    assert list(coverage.experts) == [f"model.language_model.layers.{n}.mlp.experts" for n in range(4)]
    assert coverage.expert_leaves == ("gate_proj", "up_proj", "down_proj")
    assert "mtp.layers.0.mlp.experts" in coverage.float_mtp
    assert not any(name.startswith("mtp") for name in (*coverage.float_linears, *coverage.float_experts))
    assert coverage.tied_head is False


def test_a_quantized_mtp_head_is_like_any_other_module():
    def with_mtp(module: str) -> Scheme | None:
        return FOUR if language_linears(module) or re.match(r"mtp\..*experts\.\d", module) else None

    model = written(PACKED, with_mtp, qwen_weights(fused=()))
    coverage = cover(model)
    assert coverage.float_mtp == ()
    assert "mtp.fc" in coverage.float_linears
    config = PACKED.config_files(model).quantization_config
    assert "re:^mtp.*" not in config["ignore"]
    # vLLM's and SGLang's MTP models drop plain names under mtp.
    assert r"re:mtp\.fc$" in config["ignore"]
    assert "mtp.fc" not in config["ignore"]
    assert PACKED.read_config(config, model.specs) == dict(model.modules)


def test_a_config_that_says_nothing_of_a_float_mtp_head_is_read():
    """Tools that load through transformers never see the head."""
    model = written(PACKED, under(FOUR))
    config = PACKED.config_files(model).quantization_config
    config["ignore"].remove("re:^mtp.*")
    assert PACKED.read_config(config, model.specs) == dict(model.modules)


def test_a_tied_head_is_named_though_it_has_no_tensor():
    weights = (spec for spec in qwen_weights() if not spec.name.startswith("lm_head"))
    config = PACKED.config_files(written(PACKED, under(FOUR), weights)).quantization_config
    assert "lm_head" in config["ignore"]


def test_a_quantized_head_is_targeted_by_name_because_vllm_takes_it_for_no_linear():
    model = written(PACKED, lambda module: FOUR if language_linears(module) or module == "lm_head" else None)
    (group,) = PACKED.config_files(model).quantization_config["config_groups"].values()
    assert group["targets"][0] == "Linear"
    assert re.match(group["targets"][1].removeprefix("re:"), "language_model.lm_head")


def test_ignore_names_exactly_what_is_float():
    model = written(PACKED, under(FOUR))
    ignore = PACKED.config_files(model).quantization_config["ignore"]
    assert ignore[-1] == "re:^mtp.*"
    assert set(ignore[:-1]) == {name for name in model.unquantized if not name.startswith("mtp")}


def test_experts_of_some_layers_left_float_are_ignored_by_layer():
    def but_layer_2(module: str) -> Scheme | None:
        return None if "layers.2.mlp.experts." in module else under(FOUR)(module)

    model = written(PACKED, but_layer_2)
    ignore = PACKED.config_files(model).quantization_config["ignore"]
    patterns = [entry[3:] for entry in ignore if entry.startswith("re:") and "experts" in entry]
    assert len(patterns) == 1
    for name in ("language_model.model.layers.2.mlp.experts.0.up_proj", "model.layers.2.mlp.experts"):
        assert re.match(patterns[0], name)
    assert not re.match(patterns[0], "language_model.model.layers.1.mlp.experts.0.up_proj")


def test_several_schemes_get_groups_with_anchored_targets():
    def mixed(module: str) -> Scheme | None:
        if not language_linears(module):
            return None
        return EIGHT if ".self_attn." in module or "layers.1.mlp.experts" in module else FOUR

    model = written(PACKED, mixed)
    config = PACKED.config_files(model).quantization_config
    groups = {g["weights"]["num_bits"]: g["targets"] for g in config["config_groups"].values()}
    assert set(groups) == {4, 8}
    targets = [target for listed in groups.values() for target in listed]
    assert all(target.startswith("re:") and target.endswith("$") for target in targets)
    for prefix in ("model.language_model.", "language_model.model.", "model."):
        for name, bits in (
            ("layers.3.self_attn.q_proj", 8), ("layers.0.linear_attn.in_proj_qkv", 4),
            ("layers.1.mlp.experts.0.gate_proj", 8), ("layers.0.mlp.experts.2.down_proj", 4),
        ):  # fmt: skip
            hits = {b for b, listed in groups.items() for t in listed if re.match(t[3:], prefix + name)}
            assert hits == {bits}, (prefix, name)
    # vLLM asks for the fused name first, and mtp is the business of the ignore list
    for name in ("layers.3.self_attn.qkv_proj", "linear_attn.in_proj_qkvz"):
        assert not any(re.match(t[3:], f"language_model.model.{name}") for t in targets)
    assert not any(re.match(t[3:], "mtp.layers.0.self_attn.q_proj") for t in targets)
    assert PACKED.read_config(config, model.specs) == dict(model.modules)


def test_fused_siblings_under_two_schemes_are_refused():
    def mixed(module: str) -> Scheme | None:
        return EIGHT if module.endswith("self_attn.v_proj") else under(FOUR)(module)

    with pytest.raises(SpecError, match=r"q_proj and .*v_proj have different schemes .*fuse them into .*qkv_proj"):
        cover(written(PACKED, mixed))


def test_schemes_that_differ_only_in_how_scales_were_found_are_one():
    other = Scheme(num_bits=4, group_size=32, scale_dtype=BF16, rule="gptq", clip_search=True)
    model = written(PACKED, lambda m: (other if m.endswith("v_proj") else FOUR) if language_linears(m) else None)
    assert len(PACKED.config_files(model).quantization_config["config_groups"]) == 1


def test_a_dialect_with_one_scheme_refuses_two():
    layout = QuarkInt8()
    wide = Scheme(scale_dtype=BF16)
    model = written(layout, under(wide))
    modules = {m: FOUR if m.endswith("o_proj") else wide for m in model.modules}
    mixed = type(model)(modules=modules, unquantized=model.unquantized, specs=model.specs)
    with pytest.raises(SpecError, match="quark-int8 can describe one scheme for all modules, found 2"):
        layout.config_files(mixed)


def test_patterns_list_layers_where_others_must_not_match():
    names = [f"model.layers.{n}.mlp.gate" for n in (1, 12)]
    assert patterns_for(names, (), ["model.layers.0.mlp.up"]) == [
        r"(model\.)?(language_model\.)?(model\.)?layers\.\d+\.mlp\.gate$"
    ]
    (pattern,) = patterns_for(names, (), ["model.layers.0.mlp.gate"])
    assert re.match(pattern, "language_model.model.layers.12.mlp.gate")
    assert not re.match(pattern, "language_model.model.layers.2.mlp.gate")
    with pytest.raises(SpecError, match="no expression tells"):
        patterns_for(["model.layers.0.a"], (), ["model.language_model.layers.0.a"])
    assert exact_pattern("mtp.fc") == r"mtp\.fc$"


@pytest.mark.parametrize("name", FORMATS)
def test_config_of_31_000_modules_takes_a_tenth_of_a_second(name):
    layout = format_class(name)()
    scheme = layout.resolve_scheme(layout.default_scheme(), BF16)
    model = big_model(layout, scheme)
    assert len(model.modules) > 30_900
    took = []
    for _ in range(3):
        # Processor time: other processes of the machine are not the format's doing.
        start = time.process_time()
        layout.config_files(model)
        took.append(time.process_time() - start)
    assert min(took) < 0.1, took


def big_model(layout, scheme):
    """40 layers of 256 experts; ``check`` and ``tensors`` are asked once for each shape, for they are not measured."""
    known: dict[tuple[int, ...], tuple[TensorSpec, ...]] = {}
    small = written(CtInt(), lambda module: None, qwen_weights(layers=40, experts=1))
    modules, specs = {}, small.specs.__class__()
    for weight in qwen_weights(layers=40, experts=256):
        if len(weight.shape) == 2 and language_linears(weight.module):
            modules[weight.module] = scheme
            if weight.shape not in known:
                known[weight.shape] = layout.tensors(weight, scheme)
            for spec in known[weight.shape]:
                full = f"{weight.module}.{spec.name}"
                specs[full] = TensorSpec(full, spec.dtype, spec.shape)
        else:
            specs[weight.name] = weight
    left = [name for name in small.unquantized if not language_linears(name)]
    return type(small)(modules=modules, unquantized=left, specs=specs)

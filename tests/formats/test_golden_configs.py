"""Whole checkpoints made by the tools: their configs are understood, and ours for the same content means the same."""

from __future__ import annotations

import json

import pytest

from tensorsurgeon.errors import ConfigError
from tensorsurgeon.formats.autoround import AutoRound
from tensorsurgeon.formats.awq import Awq
from tensorsurgeon.formats.base import QuantizedModel
from tensorsurgeon.formats.ct_float import CtFloat
from tensorsurgeon.formats.ct_int import CtInt
from tensorsurgeon.formats.ct_nvfp4 import CtNvfp4
from tensorsurgeon.formats.ct_packed import CtPacked
from tensorsurgeon.formats.gptq import Gptq
from tensorsurgeon.formats.quark_int8 import QuarkInt8
from tensorsurgeon.formats.registry import detect
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.dtypes import BF16, F8_E4M3, F16, F32
from tensorsurgeon.tensors.spec import SpecMap
from tests.contract.goldens import FOLDER, checkpoint, read_golden

CT = "compressed-tensors"
MADE = {
    "autoround-awq-g128-asym-qwen3": (
        Awq(), Scheme(num_bits=4, group_size=128, symmetric=False, rule="awq", scale_dtype=F16),
    ),
    "autoround_file-w4a16-qwen3-moe": (
        AutoRound(), Scheme(num_bits=4, group_size=128, rule="autoround", scale_dtype=F16),
    ),
    "gptqmodel-rtn-int4-g128-qwen3": (Gptq(), Scheme(num_bits=4, group_size=128, rule="gptq", scale_dtype=F16)),
    "llmcompressor_file-fp8-block-qwen3": (
        CtFloat(), Scheme(type="fp8", block=(128, 128), rule=CT, scale_dtype=BF16),
    ),
    "llmcompressor_file-nvfp4a16-qwen3": (
        CtNvfp4(), Scheme(type="nvfp4", num_bits=4, group_size=16, rule=CT, scale_dtype=F8_E4M3),
    ),
    "llmcompressor_file-w4a16-qwen3-moe": (
        CtPacked(), Scheme(num_bits=4, group_size=128, rule=CT, scale_dtype=BF16),
    ),
    "llmcompressor_file-w8a8-qwen3-moe": (CtInt(), Scheme(rule=CT, scale_dtype=BF16)),
    "llmcompressor_oneshot-w4a16-g32-asym-qwen3": (
        CtPacked(), Scheme(num_bits=4, group_size=32, symmetric=False, rule=CT, scale_dtype=BF16),
    ),
    "quark-int8-qwen3": (QuarkInt8(), Scheme(rule="quark", scale_dtype=BF16)),
    "quark_file-int8-qwen3-moe": (QuarkInt8(), Scheme(rule="quark", scale_dtype=F32)),
}  # fmt: skip


def linears_of(folder: str) -> list[str]:
    """Linears of the source that every tool here quantizes: all but head and routers."""
    source = "source-qwen3-moe" if folder.endswith("moe") else "source-qwen3"
    _, specs = checkpoint(FOLDER / "models" / source)
    linears = [s.module for s in specs.values() if len(s.shape) == 2 and "embed" not in s.name]
    return [module for module in linears if not module.endswith(("lm_head", "mlp.gate"))]


@pytest.mark.parametrize("folder", MADE)
def test_config_of_the_tool_is_understood(folder):
    layout, scheme = MADE[folder]
    found, schemes, _ = read_golden(folder)
    assert found == layout
    assert set(schemes) == set(linears_of(folder))
    assert set(schemes.values()) == {scheme}


@pytest.mark.parametrize("folder", MADE)
def test_our_config_for_the_same_tensors_means_the_same(folder):
    layout, _ = MADE[folder]
    _, schemes, specs = read_golden(folder)
    unquantized = [
        s.module
        for s in specs.values()
        if len(s.shape) == 2 and s.dtype is BF16 and s.name.endswith(".weight") and "embed" not in s.name
    ]
    model = QuantizedModel(modules=schemes, unquantized=unquantized, specs=specs)
    ours = layout.config_files(model).quantization_config
    assert detect({"quantization_config": ours}, specs) == layout
    assert layout.read_config(json.loads(json.dumps(ours)), specs) == schemes


@pytest.mark.parametrize("folder", [name for name in MADE if name.startswith("llmcompressor")])
def test_compressed_tensors_configs_have_equal_values_for_equal_keys(folder):
    """What readers act on; the tools' own bookkeeping (version, names of groups, how ignore is spelt) may differ."""
    layout, _ = MADE[folder]
    _, schemes, specs = read_golden(folder)
    config, _ = checkpoint(FOLDER / "models" / folder)
    theirs = config["quantization_config"]
    ours = layout.config_files(QuantizedModel(modules=schemes, unquantized=(), specs=specs)).quantization_config
    assert {key for key in ours if key not in theirs} <= {"sparsity_config"}
    for key in ("format", "quant_method", "quantization_status", "kv_cache_scheme", "transform_config"):
        assert ours[key] == theirs[key]
    (their_group,), (our_group,) = theirs["config_groups"].values(), ours["config_groups"].values()
    for key, value in our_group.items():
        if not isinstance(value, dict):
            assert their_group[key] == value
            continue
        informational = ("observer", "observer_kwargs")
        assert {k: v for k, v in value.items() if k not in informational}.items() <= their_group[key].items()


@pytest.mark.parametrize("folder", [name for name in MADE if name.startswith("quark")])
def test_quark_configs_are_equal_but_for_what_is_no_number(folder):
    layout, _ = MADE[folder]
    _, schemes, specs = read_golden(folder)
    config, _ = checkpoint(FOLDER / "models" / folder)
    theirs = config["quantization_config"]
    ours = layout.config_files(QuantizedModel(modules=schemes, unquantized=(), specs=specs)).quantization_config
    assert set(ours) == set(theirs)
    for key in ("input_tensors", "weight"):
        given = ours["global_quant_config"][key]
        assert given.items() <= theirs["global_quant_config"][key].items()
        assert set(theirs["global_quant_config"][key]) - set(given) == {"enable_buffer_reuse", "max_input_numel"}
    apart = ("global_quant_config", "exclude", "export")
    assert {k: v for k, v in ours.items() if k not in apart} == {k: v for k, v in theirs.items() if k not in apart}


def test_old_dialects_with_empty_fields_left_out_are_read():
    """compressed-tensors 0.20 omits every empty field; old AutoAWQ and AutoGPTQ had few keys."""
    _, specs = checkpoint(FOLDER / "models" / "llmcompressor_file-w4a16-qwen3-moe")
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    config = {
        "quant_method": CT, "format": "pack-quantized", "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}}, "a_key_of_next_year": {"x": 1},
    }  # fmt: skip
    layout = detect({"text_config": {"quantization_config": config}}, specs)
    assert layout == CtPacked()
    assert len(CtPacked().read_config(config, specs)) == len(linears_of("llmcompressor_file-w4a16-qwen3-moe"))
    del args["strategy"]
    assert set(CtPacked().read_config(config, specs).values()) == {Scheme(num_bits=4, group_size=128, rule=CT, scale_dtype=BF16)}
    _, awq = checkpoint(FOLDER / "models" / "autoround-awq-g128-asym-qwen3")
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}
    assert detect({"quantization_config": old}, awq) == Awq()
    assert len(Awq().read_config(old, awq)) == len(linears_of("qwen3"))
    _, gptq = checkpoint(FOLDER / "models" / "gptqmodel-rtn-int4-g128-qwen3")
    old = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "damp_percent": 0.1}
    assert len(Gptq().read_config(old, gptq)) == len(linears_of("qwen3"))


def test_a_checkpoint_that_is_not_quantized_has_no_format():
    config, specs = checkpoint(FOLDER / "models" / "source-qwen3")
    assert detect(config, specs) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method: cannot read 'bitsandbytes'"),
        ({"quant_algo": "NVFP4"}, "quant_method: cannot read None"),
        ({"quant_method": CT, "format": "marlin-24"}, "format: cannot read 'marlin-24'"),
        (
            {"quant_method": CT, "config_groups": {"a": {"format": "int-quantized"}, "b": {"format": "pack-quantized"}}},
            r"several layouts in one checkpoint \(ct-int, ct-packed\)",
        ),
        ({"quant_method": "quark"}, "global_quant_config: expected a mapping"),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}}, r"weight\.dtype: cannot read 'fp4'"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_p"}, "checkpoint_format: cannot read 'gptq_p'"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:fp8"}, "packing_format: cannot read"),
    ],
)
def test_what_no_format_reads_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        detect({"quantization_config": config}, SpecMap())

"""Ask vLLM's own code, in its own environment, which modules of a config it would quantize.

    VLLM_PYTHON ask_vllm.py QUESTIONS ANSWERS

QUESTIONS: {case: {"config": quantization_config, "modules": [[name, kind], ...]}} with HF names; ANSWERS: {case: {vLLM
name: bits, "quantized" where the dialect has one scheme, or null}}. Names are mapped and fused as Qwen3.5-MoE does it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.quark.utils import should_ignore_layer
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.models.qwen3_5 import Qwen3_5MoeForConditionalGeneration

MODEL = Qwen3_5MoeForConditionalGeneration
CLASSES = {
    "compressed-tensors": "compressed-tensors", "quark": "quark", "gptq": "auto_gptq", "awq": "auto_awq", "fp8": "fp8",
    "auto-round": "inc",
}  # fmt: skip
LINEAR, EXPERTS = object.__new__(ColumnParallelLinear), object.__new__(RoutedExperts)
EXPERT_LEAVES = ("gate_proj", "up_proj", "down_proj")


def vllm_name(name: str) -> str:
    """The module's name in vLLM, fused where vLLM fuses it. The mapper drops MTP names, which stay as they are."""
    mapper = MODEL.hf_to_vllm_mapper
    renaming = {f.name: getattr(mapper, f.name) for f in dataclasses.fields(mapper) if "stacked" not in f.name}
    if not name.startswith("mtp."):
        (name,) = type(mapper)(**renaming).apply_list([name])
    parent, _, leaf = name.rpartition(".")
    fused = {part: whole for whole, parts in MODEL.packed_modules_mapping.items() for part in parts}
    return f"{parent}.{fused[leaf]}" if leaf in fused else name


def answer(method: str, config: Any, name: str, is_experts: bool) -> Any:
    """What vLLM does with this module: bits, "quantized" or None."""
    if method == "compressed-tensors":
        if is_experts:
            config._add_fused_moe_to_target_scheme_map()
        layer = EXPERTS if is_experts else LINEAR
        names = [f"{name}.0.{leaf}" for leaf in EXPERT_LEAVES] if is_experts else [name]
        schemes = [config.get_scheme_dict(layer, asked) for asked in names]
        assert all(scheme == schemes[0] for scheme in schemes)
        return schemes[0] and schemes[0]["weights"].num_bits
    fused = config.packed_modules_mapping
    if method == "quark":
        exclude = config.quant_config["exclude"]
        skipped = should_ignore_layer(name, ignore=exclude, fused_mapping=fused, check_children=is_experts)
        return None if skipped else "quantized"
    if method == "gptq":
        if get_dynamic_override(config, name) is False:
            return None
        return get_dynamic_override(config, name, "bits", config.weight_bits)
    if method == "awq":
        mapping = {} if is_experts else fused
        skipped = is_layer_skipped(name, config.modules_to_not_convert, mapping, match_mode="substring")
        return None if skipped else "quantized"
    if method == "fp8":
        return None if is_layer_skipped(name, config.ignored_layers, fused) else "quantized"
    if (config.extra_config or {}).get(name, {}).get("bits", 0) >= 16:
        return None
    bits = config.config_parser.resolve(EXPERTS if is_experts else LINEAR, name).bits
    return None if bits >= 16 else bits


def main() -> None:
    questions = json.loads(Path(sys.argv[1]).read_text())
    answers: dict[str, dict[str, Any]] = {}
    for case, question in questions.items():
        method = question["config"]["quant_method"]
        config = get_quantization_config(CLASSES[method]).from_config(copy.deepcopy(question["config"]))
        config.packed_modules_mapping = dict(MODEL.packed_modules_mapping)
        config.apply_vllm_mapper(MODEL.hf_to_vllm_mapper)
        found = answers[case] = {}
        for name, is_experts in question["modules"]:
            found[name] = answer(method, config, vllm_name(name), is_experts)
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
